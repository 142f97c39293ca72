// A conversation as it is read: questions with their media, answers with what they took.

import { copy, icon, iconButton, make } from "./dom.js";
import { Follow } from "./follow.js";
import { render } from "./markdown.js";
import { pictureOf } from "./thumbs.js";
import { versionOf } from "./versions.js";
import { enlarge } from "./viewer.js";
import { progressText, sizeText, statsText } from "./words.js";

const REDRAW = 60; // ms between drawings of an answer that grows
const ENDINGS = {
  stopped: "Stopped.",
  interrupted: "Interrupted: the page was closed before the answer was complete.",
};

export class Turns {
  /**
   * @param {HTMLElement} list where the turns are shown.
   * @param {HTMLElement} scroll what scrolls around it.
   * @param {HTMLElement} latest the button that leads to the end.
   * @param {{retry: (turn: object) => void, edit: (turn: object) => void, choose: (turn: object, place: number) => void}} actions
   */
  constructor(list, scroll, latest, actions) {
    this.list = list;
    this.follow = new Follow(scroll, list, latest);
    this.actions = actions;
    this.elements = new Map();
    this.later = new Map();
  }

  /** Shows a whole conversation. */
  show(turns) {
    for (const timer of this.later.values()) clearTimeout(timer);
    this.later.clear();
    this.elements.clear();
    this.list.replaceChildren();
    this.turns = turns;
    for (const turn of turns) this.add(turn);
    this.follow.toEnd();
  }

  /** Shows another version of a turn, and what followed that; the view stays where it is. */
  change(turn) {
    for (const [other, element] of this.elements) {
      if (this.turns.includes(other)) continue;
      element.remove();
      this.elements.delete(other);
    }
    this.fill(turn, this.elements.get(turn));
    for (const other of this.turns) if (!this.elements.has(other)) this.add(other);
  }

  /** Shows what the server is reading before the first word. */
  progress(turn, progress) {
    const waiting = this.elements.get(turn)?.querySelector(".waiting .progress");
    if (waiting) waiting.textContent = progressText(progress);
  }

  /** Shows a turn that is new or has changed; while it grows not at every piece. */
  update(turn) {
    if (!this.turns?.includes(turn)) return;
    if (!this.elements.has(turn)) {
      this.add(turn);
      this.follow.toEnd();
    } else if (turn.state === "growing") {
      if (!this.later.has(turn)) this.later.set(turn, setTimeout(() => this.redraw(turn), REDRAW));
    } else this.redraw(turn);
  }

  redraw(turn) {
    clearTimeout(this.later.get(turn));
    this.later.delete(turn);
    const element = this.elements.get(turn);
    if (element) this.fill(turn, element); // Else another version is shown by now.
    this.follow.stick();
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
    // A button that was just pressed keeps the focus.
    const pressed = element.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    element.classList.toggle("growing", open);
    element.replaceChildren(make("article", { "aria-label": turn.model ? `Answer of ${turn.model}` : "Answer", "aria-busy": String(open) },
      body,
      open && !turn.text ? make("p.waiting", { "aria-label": "Waiting for the first word" }, make("i"), make("i"), make("i"), make("span.progress")) : null,
      this.ending(turn),
      open ? null : this.doings(turn)));
    if (pressed) element.querySelector(`[aria-label="${CSS.escape(pressed)}"]:enabled`)?.focus();
  }

  ending(turn) {
    if (turn.state === "failed") {
      return make("div.trouble", { role: "alert" }, make("p", {}, turn.error),
        make("button.quiet", { type: "button", click: () => this.actions.retry(turn) }, icon("retry"), "Try again"));
    }
    if (turn.reason === "length") return make("p.note", {}, "The answer ends here because it reached the token limit.");
    return ENDINGS[turn.state] ? make("p.note", {}, ENDINGS[turn.state]) : null;
  }

  doings(turn) {
    const copyButton = iconButton("copy", "Copy the answer", () => copy(copyButton, turn.text), "small");
    const retry = iconButton("retry", "Regenerate the answer", () => this.actions.retry(turn), "small", "retry");
    const words = turn.text || turn.state !== "failed";
    if (!words && versionOf(turn).count === 1) return null;
    return make("div.doings", {}, this.versions(turn), turn.text ? copyButton : null, words ? retry : null,
      make("p.stats", {}, statsText(turn.stats)));
  }

  versions(turn) {
    const { place, count } = versionOf(turn);
    if (count === 1) return null;
    const step = (name, label, to) => {
      const button = iconButton(name, label, () => this.actions.choose(turn, to), "small");
      button.disabled = to < 0 || to >= count;
      return button;
    };
    return make("div.versions", { role: "group", "aria-label": "Versions of the answer" },
      step("back", "Earlier version", place - 1), make("span", {}, `${place + 1}/${count}`), step("forward", "Later version", place + 1));
  }
}

function shown(item) {
  const named = item.thumb && item.kind === "image" ? null : make("span.facts", {}, item.name, make("small", {}, sizeText(item.size)));
  if (item.kind === "document") return make("figure.medium", {}, pictureOf(item), named);
  return make("button.medium", { type: "button", "aria-label": `Show ${item.name}`, click: () => enlarge(item) }, pictureOf(item), named);
}
