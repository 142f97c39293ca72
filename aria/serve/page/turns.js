// A conversation as it is read: questions with their media, answers with what they took.

import { sizeText } from "./attachments.js";
import { copy, icon, iconButton, make } from "./dom.js";
import { render } from "./markdown.js";
import { loadMedium } from "./store.js";

const REDRAW = 60; // ms between drawings of an answer that grows
const ENDINGS = {
  stopped: "Stopped.",
  interrupted: "Interrupted: the page was closed before the answer was whole.",
};

export class Turns {
  /**
   * @param {HTMLElement} list where the turns are shown.
   * @param {HTMLElement} scroll what scrolls around it.
   * @param {{retry: () => void, edit: (turn: object) => void}} actions
   */
  constructor(list, scroll, actions) {
    this.list = list;
    this.scroll = scroll;
    this.actions = actions;
    this.elements = new Map();
    this.later = new Map();
    this.following = true;
    scroll.addEventListener("scroll", () => {
      this.following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
    });
  }

  /** Shows a whole conversation. */
  show(turns) {
    for (const timer of this.later.values()) clearTimeout(timer);
    this.later.clear();
    this.elements.clear();
    this.list.replaceChildren();
    this.turns = turns;
    for (const turn of turns) this.add(turn);
    this.following = true;
    this.follow();
  }

  /** Shows a turn that is new or has changed; while it grows not at every piece. */
  update(turn) {
    if (!this.turns?.includes(turn)) return;
    if (!this.elements.has(turn)) {
      this.following = true;
      this.add(turn);
      this.follow();
    } else if (turn.state === "growing") {
      if (!this.later.has(turn)) this.later.set(turn, setTimeout(() => this.redraw(turn), REDRAW));
    } else this.redraw(turn);
  }

  redraw(turn) {
    clearTimeout(this.later.get(turn));
    this.later.delete(turn);
    this.fill(turn, this.elements.get(turn));
    this.follow();
  }

  follow() {
    if (this.following) this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  add(turn) {
    const mine = turn.role === "user";
    const element = make(`li.turn.${mine ? "mine" : "hers"}`, {});
    this.elements.set(turn, element);
    if (mine) this.fillQuestion(turn, element);
    else this.fill(turn, element);
    this.list.append(element);
  }

  fillQuestion(turn, element) {
    const media = turn.media.map((item) => shown(item));
    const copyButton = iconButton("copy", "Copy the message", () => copy(copyButton, turn.text), "small");
    element.append(make("article", { "aria-label": "You" },
      media.length ? make("div.shown", {}, ...media) : null,
      turn.text ? make("p.text", {}, turn.text) : null,
      make("div.doings", {}, copyButton, iconButton("edit", "Edit and send again", () => this.actions.edit(turn), "small"))));
  }

  fill(turn, element) {
    const open = turn.state === "growing";
    const body = make("div.text.markdown", {});
    body.append(render(turn.text, !open));
    element.classList.toggle("growing", open);
    element.replaceChildren(make("article", { "aria-label": turn.model ? `Answer of ${turn.model}` : "Answer", "aria-busy": String(open) },
      body,
      open && !turn.text ? make("p.waiting", { "aria-label": "Waiting for the first word" }, make("i"), make("i"), make("i")) : null,
      this.ending(turn),
      open || (turn.state === "failed" && !turn.text) ? null : this.doings(turn)));
  }

  ending(turn) {
    if (turn.state === "failed") {
      return make("div.trouble", { role: "alert" }, make("p", {}, turn.error),
        make("button.quiet", { type: "button", click: () => this.actions.retry() }, icon("retry"), "Try again"));
    }
    if (turn.reason === "length") return make("p.note", {}, "The answer ends here because it reached the most tokens allowed.");
    return ENDINGS[turn.state] ? make("p.note", {}, ENDINGS[turn.state]) : null;
  }

  doings(turn) {
    const copyButton = iconButton("copy", "Copy the answer", () => copy(copyButton, turn.text), "small");
    const retry = iconButton("retry", "Answer again", () => this.actions.retry(), "small", "retry");
    return make("div.doings", {}, turn.text ? copyButton : null, retry, make("p.stats", {}, statsText(turn.stats)));
  }
}

/** Such as "12 tokens/s, first after 0.31 s, 9 of 84 tokens". */
export function statsText(stats) {
  const said = [];
  if (stats.rate) said.push(`${stats.rate < 10 ? stats.rate.toFixed(1) : Math.round(stats.rate)} tokens/s`);
  if (stats.first !== undefined) said.push(`first token after ${stats.first.toFixed(2)} s`);
  if (stats.prompt !== undefined) {
    const cached = stats.cached ? ` (${stats.cached.toLocaleString()} remembered)` : "";
    said.push(`${stats.prompt.toLocaleString()} tokens read${cached}, ${stats.completion.toLocaleString()} written`);
  }
  if (stats.prompt === undefined && stats.completion) said.push(`${stats.completion.toLocaleString()} tokens written`);
  return said.join(" \u00b7 ");
}

function shown(item) {
  const picture = item.thumb ? make("img", { src: item.thumb, alt: item.name }) : icon(item.kind === "video" ? "clip" : "document");
  const named = item.thumb && item.kind === "image" ? null : make("span", {}, item.name, make("small", {}, sizeText(item.size)));
  if (item.kind === "document") return make("figure.medium", {}, picture, named);
  return make("button.medium", { type: "button", "aria-label": `Show ${item.name}`, click: () => enlarge(item) }, picture, named);
}

/** The medium itself, in a dialog. */
async function enlarge(item) {
  const dialog = make("dialog.large", { "aria-label": item.name });
  const close = iconButton("close", "Close", () => dialog.close());
  let address = null;
  try {
    address = URL.createObjectURL(await loadMedium(item.id));
    dialog.append(item.kind === "image" ? make("img", { src: address, alt: item.name })
      : make("video", { src: address, controls: true, autoplay: true }));
  } catch (error) {
    dialog.append(make("p", {}, error.message));
  }
  dialog.append(close);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (address) URL.revokeObjectURL(address);
  });
  document.body.append(dialog);
  dialog.showModal();
}
