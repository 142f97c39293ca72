// Making elements.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (selector) => document.querySelector(selector);

/**
 * An element.
 * @param {string} tag such as "button.icon.strong": a name and classes.
 * @param {object} attributes functions become listeners ({click: f}); true, false and null are attributes that are there or not.
 * @param {(Node | string | null)[]} children null is left out.
 */
export function make(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.classList.add(...classes);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** One of the drawings of icons.svg; the words are said elsewhere. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `icons.svg#${name}`);
  svg.append(use);
  return svg;
}

export function iconButton(name, label, click, ...classes) {
  return make(["button", "icon", ...classes].join("."), { type: "button", title: label, "aria-label": label, click }, icon(name));
}

/** Tells people who do not see the page what has happened. */
export function say(text) {
  $("#said").textContent = text;
}

/** Copies text, and shows on the button that it was done. */
export async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages on plain http that are not on this computer have no clipboard of the new kind.
    const field = make("textarea.unseen", { readonly: true });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    if (!done) return say("The browser did not allow copying.");
  }
  const before = button.querySelector("svg");
  before.replaceWith(icon("check"));
  say("Copied");
  setTimeout(() => button.querySelector("svg").replaceWith(before), 1500);
}

/** Asks for a text, or, without a value, for a yes. @returns {Promise<string | null>} null: cancelled. */
export async function ask(title, yes, value = null) {
  const dialog = $("#ask");
  const field = dialog.querySelector("input");
  $("#ask-title").textContent = title;
  $("#ask-yes").textContent = yes;
  $("#ask-label").hidden = value === null;
  $("#ask-label span").textContent = "Name";
  field.value = value ?? "";
  return (await opened(dialog)) === "yes" ? field.value.trim() : null;
}

/** Shows a dialog until it is closed; resolves to the value of the button that did, "cancel" for Esc. */
export function opened(dialog) {
  return new Promise((done) => {
    dialog.returnValue = "cancel";
    // Enter in a field means the last button, not the first one, which cancels.
    const enter = (event) => {
      if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
      event.preventDefault();
      dialog.querySelector("form").requestSubmit(dialog.querySelector("button.strong"));
    };
    dialog.addEventListener("keydown", enter);
    dialog.addEventListener("close", () => {
      dialog.removeEventListener("keydown", enter);
      done(dialog.returnValue);
    }, { once: true });
    dialog.showModal();
  });
}

export function save(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
