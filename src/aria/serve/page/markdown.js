// An answer's markdown -> elements in which nothing runs, and nothing is loaded.

import { copy, icon, make } from "./dom.js";
import { draw, formulas } from "./formulas.js";
import { Marked, Tokenizer } from "./vendor/marked.esm.js";
import "./vendor/purify.min.js";

// Signs of a block in which nothing stands are text: they may be the whole answer ("85.", "-", "#", ">").
const blocks = {
  list(text) {
    const { top } = this.lexer.state;
    const token = Tokenizer.prototype.list.call(this, text);
    if (!token || isList(token, this.lexer)) return token;
    this.lexer.state.top = top;
    return undefined;
  },
  heading(text) {
    const token = Tokenizer.prototype.heading.call(this, text);
    return token?.text ? token : undefined;
  },
  // One or two signs under a line are most often a list that is about to be written.
  lheading(text) {
    const token = Tokenizer.prototype.lheading.call(this, text);
    return token && /(?:={3,}|-{3,})[ \t]*\n*$/.test(token.raw) ? token : undefined;
  },
  blockquote(text) {
    if (COMPARISON.test(text)) return undefined;
    const token = Tokenizer.prototype.blockquote.call(this, text);
    return token?.text.trim() ? token : undefined;
  },
};
// "> 90 %", ">50" and ">= 3" are numbers.
const COMPARISON = /^ {0,3}>(?:[=\d]|\s*[-+$€£]?[\d.,]+\s*[%°\w]{0,3}\s*$)/;

/** A number with a dot begins a list if it is 0 or 1, continues a list that ended, or is not alone. */
function isList(token, lexer) {
  if (token.items.every((item) => !item.text.trim())) return false;
  if (!token.ordered) return true;
  const start = Number(token.start || 1);
  if (token.items.length === 1 && start > 1 && start !== lexer.nextNumber) return false;
  lexer.nextNumber = start + token.items.length;
  return true;
}

const parser = new Marked({
  gfm: true,
  breaks: true,
  tokenizer: blocks,
  renderer: {
    // A picture that a model names lies elsewhere, or nowhere: its words are kept.
    image: ({ text, href }) => escape(text || href),
    checkbox: ({ checked }) => (checked ? "\u2611 " : "\u2610 "),
    // Tags that a model writes are text that people want to see.
    html: ({ text }) => escape(text),
  },
}, formulas);

const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
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
  // Whatever else markdown would hide as a whole, such as the address of a link that is not there.
  if (!fragment.textContent.trim() && (whole || !fragment.querySelector("pre"))) fragment.replaceChildren(make("p", {}, text));
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
  draw(fragment);
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
