// The files that go with the next message: thumbnails, settings, and what each of them costs.

import { ServerError, tokenize } from "./api.js";
import { iconButton, make } from "./dom.js";
import { partOf } from "./parts.js";
import { randomId, saveMedium } from "./store.js";
import { pictureOf, thumbOf } from "./thumbs.js";
import { dataUri } from "./transfer.js";
import { costText, progressText, sizeText } from "./words.js";

const ENDINGS = {
  image: /\.(png|jpe?g|webp|gif|bmp|tiff?)$/i,
  video: /\.(mp4|m4v|mov|webm|mkv|avi|mpe?g|ogv)$/i,
  document: /\.pdf$/i,
};
const TYPES = { image: /^image\//, video: /^video\//, document: /^application\/pdf$/ };
const SETTLE = 350; // ms without a change of settings before the server is asked again
/** Statuses that concern the file itself; others concern the server, and may be gone when the message is sent. */
const REFUSALS = [400, 413, 415];

export function kindOf(file) {
  const kinds = Object.keys(TYPES);
  return kinds.find((kind) => TYPES[kind].test(file.type)) ?? kinds.find((kind) => ENDINGS[kind].test(file.name)) ?? null;
}

/** Hands what was taken out over to a message, its bytes to the database. @returns {Promise<object[]>} */
export async function keep(taken) {
  for (const entry of taken) {
    await entry.ready;
    if (!entry.kept) await saveMedium(entry.item.id, entry.blob);
    entry.kept = true;
  }
  return taken.map((entry) => entry.item);
}

export class Attachments {
  /**
   * @param {HTMLElement} list where they are shown.
   * @param {() => {id: string, max_model_len?: number} | null} model the one that is chosen.
   * @param {() => void} changed called when an item came, went, or has its cost known.
   */
  constructor(list, model, changed) {
    this.list = list;
    this.model = model;
    this.changed = changed;
    this.items = [];
  }

  /** Adds files. @returns {string[]} the names of those that are of no kind that Aria reads. */
  add(files, settings = {}) {
    const refused = [];
    for (const file of files) {
      const kind = kindOf(file);
      if (kind === null) {
        refused.push(file.name);
        continue;
      }
      const item = { id: randomId(), kind, name: file.name || "pasted", type: file.type, size: file.size, thumb: null, pages: null,
                     settings: { ...this.usual(kind), ...settings } };
      this.put(item, file);
    }
    return refused;
  }

  /** Shows an item. @param {boolean} kept whether its bytes lie in the browser's database already. */
  put(item, blob, kept = false) {
    const entry = { item, blob, kept, cost: null, refusal: null, unreadable: false, request: null, element: null };
    this.items.push(entry);
    this.show(entry);
    this.ask(entry);
    entry.ready = kept ? Promise.resolve() : thumbOf(item.kind, blob).then((thumb) => {
      item.thumb ??= thumb;
      this.picture(entry);
    });
  }

  /** Few enough frames that a clip fits beside a conversation; the server's own numbers for the rest. */
  usual(kind) {
    const room = this.model()?.max_model_len ?? 65_536;
    return kind === "video" ? { frames: Math.max(1, Math.min(128, Math.floor(room / 512))) } : {};
  }

  remove(entry) {
    entry.request?.abort();
    clearTimeout(entry.timer);
    this.items = this.items.filter((other) => other !== entry);
    const next = entry.element.nextElementSibling ?? entry.element.previousElementSibling;
    entry.element.remove();
    (next?.querySelector("button") ?? document.querySelector("#question")).focus();
    this.changed();
  }

  /** Takes all items out of the list. */
  clear() {
    const taken = this.items;
    this.items = [];
    this.list.replaceChildren();
    for (const entry of taken) {
      entry.request?.abort();
      clearTimeout(entry.timer);
    }
    this.changed();
    return taken;
  }

  /** Puts back what was taken out. */
  restore(taken) {
    for (const { item, blob, kept } of taken) this.put(item, blob, kept);
  }

  /** Tokens of all items, null while one of them is not known. */
  get tokens() {
    return this.items.reduce((sum, { cost }) => (sum === null || cost === null ? null : sum + cost.tokens), 0);
  }

  /** Items that the server cannot read. */
  get unreadable() {
    return this.items.filter((entry) => entry.unreadable);
  }

  /** Waits until the server has looked at every item. */
  async checked() {
    for (const entry of this.items) if (entry.timer) this.ask(entry);
    let entry;
    while ((entry = this.items.find(({ asking }) => asking))) await entry.asking;
  }

  /** Asks again what every item costs, for another model or after the server came back. */
  askAll() {
    for (const entry of this.items) this.ask(entry);
  }

  /** Asks what an item costs, and with that whether it can be read. */
  ask(entry) {
    clearTimeout(entry.timer);
    entry.request?.abort();
    const request = (entry.request = new AbortController());
    Object.assign(entry, { timer: null, cost: null, refusal: null, unreadable: false });
    this.tell(entry);
    const asking = this.look(entry, request.signal).finally(() => {
      if (entry.asking !== asking) return;
      entry.asking = null;
      this.changed();
    });
    entry.asking = asking;
    this.changed();
  }

  async look(entry, signal) {
    const { item } = entry;
    try {
      entry.uri ??= await dataUri(entry.blob);
      const messages = [{ role: "user", content: [partOf(item, entry.uri)] }];
      const progress = (update) => signal.aborted || (entry.progress.textContent = progressText(update));
      const counted = await tokenize(this.model()?.id, messages, { signal, progress });
      if (signal.aborted) return;
      [entry.cost] = counted.media;
      // Browsers draw no documents and not every clip.
      if (entry.cost.preview && (item.kind === "document" || !item.thumb)) item.thumb = entry.cost.preview;
      item.pages = entry.cost.total ?? null;
      this.picture(entry);
    } catch (error) {
      if (signal.aborted) return;
      entry.refusal = error.message;
      entry.unreadable = !(error instanceof ServerError) || REFUSALS.includes(error.status);
    }
    this.tell(entry);
  }

  show(entry) {
    const { item } = entry;
    entry.status = make("p.price", { role: "status" });
    entry.progress = make("p.progress");
    entry.thumb = make("div.thumb", {});
    const settings = iconButton("sliders", `Settings of ${item.name}`, () => {
      const open = entry.element.classList.toggle("open");
      settings.setAttribute("aria-expanded", String(open));
    }, "small", "narrow");
    settings.setAttribute("aria-expanded", "false");
    entry.element = make("li.item", {}, entry.thumb,
      make("div.facts", {}, make("p.name", { title: item.name }, item.name), entry.status, entry.progress, this.settings(entry)),
      iconButton("close", `Remove ${item.name}`, () => this.remove(entry), "small"), settings);
    this.list.append(entry.element);
    this.picture(entry);
    this.tell(entry);
  }

  picture(entry) {
    entry.thumb.replaceChildren(pictureOf(entry.item));
  }

  tell(entry) {
    entry.status.textContent = entry.refusal ?? (entry.cost ? costText(entry.item.kind, entry.cost) : "\u2026");
    entry.status.classList.toggle("wrong", entry.refusal !== null);
    entry.status.title = `${sizeText(entry.item.size)}`;
    entry.element.classList.toggle("refused", entry.refusal !== null);
    if (entry.cost || entry.refusal) entry.progress.replaceChildren();
  }

  settings(entry) {
    const { item } = entry;
    const change = (name, value) => {
      if (value === undefined) delete item.settings[name];
      else item.settings[name] = value;
      clearTimeout(entry.timer);
      entry.timer = setTimeout(() => this.ask(entry), SETTLE);
    };
    const fields = [choice("Detail", item.settings.detail, [["", "auto"], ["low", "low"], ["high", "high"]],
                           (value) => change("detail", value || undefined))];
    if (item.kind === "video") {
      fields.unshift(number("Frames", item.settings.frames, (value) => change("frames", value)));
    } else {
      const split = item.settings.split === undefined ? "" : String(item.settings.split);
      fields.push(choice("Split", split, [["", "auto"], ["true", "on"], ["false", "off"]],
                         (value) => change("split", value === "" ? undefined : value === "true")));
    }
    if (item.kind === "document") {
      const field = make("input", { type: "text", placeholder: "all", inputmode: "text", size: 5 });
      field.value = item.settings.pages ?? "";
      field.addEventListener("input", () => change("pages", field.value.trim() || undefined));
      fields.unshift(make("label", { title: "Such as 1-3,7" }, "Pages", field));
    }
    return make("div.knobs", {}, ...fields);
  }
}

function choice(label, value, options, chosen) {
  const select = make("select", {}, ...options.map(([key, text]) => make("option", { value: key }, text)));
  select.value = value ?? "";
  select.addEventListener("change", () => chosen(select.value));
  return make("label", {}, label, select);
}

function number(label, value, chosen) {
  const field = make("input", { type: "number", min: 1, step: 1, placeholder: "auto" });
  field.value = value ?? "";
  field.addEventListener("input", () => {
    if (field.validity.valid) chosen(field.value ? Number(field.value) : undefined);
  });
  return make("label", {}, label, field);
}
