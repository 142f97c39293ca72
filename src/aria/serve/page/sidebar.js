// The list of conversations: choose, search, rename, export, delete.

import { $, ask, icon, make } from "./dom.js";
import { exportJson, exportMarkdown } from "./transfer.js";
import { allTurns } from "./versions.js";

export class Sidebar {
  /** @param {{choose, rename, remove, fail}} actions what to do with a conversation, or with an error. */
  constructor(actions) {
    this.actions = actions;
    this.narrow = window.matchMedia("(max-width: 800px)");
    $("#search").addEventListener("input", () => this.show(this.conversations, this.current));
    $("#open-sidebar").addEventListener("click", () => this.open(true));
    $("#close-sidebar").addEventListener("click", () => this.open(false));
    $("#veil").addEventListener("click", () => this.open(false));
    document.addEventListener("click", (event) => {
      const menu = document.querySelector(".more[open]");
      if (menu && !menu.contains(event.target)) menu.open = false;
    });
    this.narrow.addEventListener("change", () => this.open(false));
    this.open(false);
  }

  /** Only a narrow page opens and closes it: elsewhere it is always there. */
  open(yes) {
    const narrow = this.narrow.matches;
    const was = $("#sidebar").classList.contains("open");
    $("#sidebar").classList.toggle("open", yes);
    $("#sidebar").inert = narrow && !yes;
    document.querySelector(".room").inert = narrow && yes;
    $("#veil").hidden = !(narrow && yes);
    $("#open-sidebar").setAttribute("aria-expanded", String(yes));
    if (narrow && yes) $("#close-sidebar").focus();
    else if (narrow && was) $("#open-sidebar").focus();
  }

  get isOpen() {
    return this.narrow.matches && $("#sidebar").classList.contains("open");
  }

  /** Closes the menu of a conversation. @returns {boolean} whether one was open. */
  closeMenu() {
    const menu = document.querySelector(".more[open]");
    if (!menu) return false;
    menu.open = false;
    menu.querySelector("summary").focus();
    return true;
  }

  show(conversations, current) {
    this.conversations = conversations;
    this.current = current;
    const wanted = $("#search").value.trim().toLowerCase();
    const found = conversations.filter((one) => !wanted || matches(one, wanted));
    $("#conversations").replaceChildren(...found.map((one) => this.entry(one, one === current)));
    if (!found.length) {
      const why = wanted ? "Nothing found." : "No conversations yet.";
      $("#conversations").append(make("li.note", {}, why));
    }
  }

  entry(conversation, current) {
    const act = (work) => async () => {
      try {
        await work();
      } catch (error) {
        this.actions.fail(error);
      }
    };
    const choice = (name, text, work) => make("button.quiet", { type: "button", click: act(work) }, icon(name), text);
    const more = make("details.more", { name: "more", focusout: (event) => {
      // Another element has the focus: a menu that nobody uses closes.
      if (event.relatedTarget && !more.contains(event.relatedTarget)) more.open = false;
    } },
      make("summary", { "aria-label": `More about ${conversation.title}`, title: "More" }, "\u22ef"),
      make("div.choices", {},
        choice("edit", "Rename", () => this.rename(conversation)),
        choice("download", "Export as JSON", () => exportJson([conversation])),
        choice("download", "Export as Markdown", () => exportMarkdown(conversation)),
        choice("trash", "Delete", () => this.remove(conversation))));
    return make("li.entry", {},
      make("button.title", {
        type: "button", "aria-current": current ? "true" : null, title: conversation.title,
        click: () => this.actions.choose(conversation),
      }, conversation.title),
      more);
  }

  async rename(conversation) {
    const title = await ask("Rename the conversation", "Rename", conversation.title);
    if (title) await this.actions.rename(conversation, title);
  }

  async remove(conversation) {
    const sure = await ask(`Delete \u201c${conversation.title}\u201d? This cannot be undone.`, "Delete");
    if (sure !== null) await this.actions.remove(conversation);
  }
}

function matches(conversation, wanted) {
  const texts = [conversation.title, ...[...allTurns(conversation.turns)].map((turn) => turn.text)];
  return texts.some((text) => text.toLowerCase().includes(wanted));
}
