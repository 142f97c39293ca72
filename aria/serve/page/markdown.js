// An answer's markdown -> elements in which nothing runs, and nothing is loaded.

import { copy, icon, make } from "./dom.js";
import { Marked } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";

const parser = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // A picture that a model names lies elsewhere, or nowhere: its words are kept.
    image: ({ text, href }) => escape(text || href),
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
    // Tags that a model writes are text that people want to see.
    html: ({ text }) => escape(text),
  },
});

const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const RULES = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["align", "class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  RETURN_DOM_FRAGMENT: true,
};

function escape(text) {
  return text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

/**
 * @param {string} text markdown.
 * @param {boolean} whole false while it still grows: what takes time waits for the end.
 * @returns {DocumentFragment}
 */
export function render(text, whole) {
  const fragment = globalThis.DOMPurify.sanitize(parser.parse(text), RULES);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div.wide-content", { tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) frameCode(code, whole);
  return fragment;
}

function frameCode(code, whole) {
  const language = /language-([\w+#.-]+)/.exec(code.className)?.[1] ?? "";
  const block = code.parentElement;
  const button = make("button.quiet", { type: "button", click: () => copy(button, code.textContent) }, icon("copy"), "Copy");
  const frame = make("div.code", {}, make("div.code-head", {}, make("span", {}, language || "text"), button));
  block.replaceWith(frame);
  block.tabIndex = 0;
  frame.append(block);
  if (whole && language) colour(code, language);
}

async function colour(code, language) {
  const { default: highlighter } = await import("./vendor/highlight.min.js");
  if (highlighter.getLanguage(language)) highlighter.highlightElement(code);
}
