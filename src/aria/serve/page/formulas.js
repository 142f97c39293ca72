// Formulas in answers: $...$ and \(...\) within a line, $$...$$ and \[...\] on lines of their own, drawn by KaTeX.

import "./vendor/purify.min.js";

const NO_BLANK_LINE = String.raw`(?!\n[ \t]*\n)`;
const DISPLAY = String.raw`\$\$(?!\$)(?:${NO_BLANK_LINE}(?:\\[\s\S]|[^\\$]|\$(?!\$)))+?\$\$|\\\[(?:${NO_BLANK_LINE}[\s\S])+?\\\]`;
// The signs of "$5 and $6" stand before numbers and after spaces; those of formulas touch them on the inner side.
const INLINE = String.raw`\\\((?:${NO_BLANK_LINE}[\s\S])+?\\\)|\$(?=[^\s$])(?:\\[^\n]|[^\\$\n])*?[^\s\\$]\$(?![\dA-Z_$])`;
const FORMULA = new RegExp(`${DISPLAY}|${INLINE}`, "y");
const BLOCK = new RegExp(` {0,3}(${DISPLAY})[ \\t]*([.,;]?)[ \\t]*(?:\\n|$)`, "y");
const WORDS = /\\(?:text\w*|math\w*|operatorname|mbox)\s*\{[^{}]*\}/g;
// "$5 million, 6$": a number and words, or two words in a row, are nobody's formula.
const PROSE = /^\$[\d.,]+[\s,;(]*\s\(?[A-Za-z]{2,}|(?<!\\)\b[A-Za-z]{2,}\s+[A-Za-z]{2,}/;
const DRAWN = {
  USE_PROFILES: { html: true, mathMl: true, svg: true },
  ADD_TAGS: ["semantics", "annotation"],
  FORBID_TAGS: ["a", "form", "img", "image", "style"],
  IN_PLACE: true,
};
const DRAWINGS_KEPT = 500;

/** The formula that begins at a place of a text, with its delimiters. @returns {string | null} */
function formulaAt(text, place) {
  FORMULA.lastIndex = place;
  const raw = FORMULA.exec(text)?.[0];
  if (!raw || !texOf(raw).trim()) return null;
  return isSingle(raw) && PROSE.test(raw.replace(WORDS, "")) ? null : raw;
}

const isSingle = (raw) => raw[0] === "$" && raw[1] !== "$";
const isDisplay = (raw) => raw.startsWith("$$") || raw.startsWith("\\[");
const texOf = (raw) => (isSingle(raw) ? raw.slice(1, -1) : raw.slice(2, -2));

const CLOSING = { $: "$", "\\(": "\\)", "\\[": "\\]" };

/** Places where formulas begin. A dollar sign behind a letter or digit, as in "US$", begins none. */
function* formulasIn(text) {
  const last = Object.fromEntries(Object.entries(CLOSING).map(([opening, closing]) => [opening, text.lastIndexOf(closing)]));
  for (const { 0: signs, index } of text.matchAll(/\\[\\$]|(?<![\p{L}\p{N}])\$|\\[([]/gu)) {
    if (index < last[signs] && formulaAt(text, index)) yield index;
  }
}

function blockAt(text, place) {
  BLOCK.lastIndex = place;
  const found = BLOCK.exec(text);
  return found && texOf(found[1]).trim() ? found : null;
}

function blockStart(text) {
  for (const { index } of text.matchAll(/\n(?= {0,3}(?:\$\$|\\\[))/g)) if (blockAt(text, index + 1)) return index + 1;
  return undefined;
}

const span = (raw) => `<span class="math">${raw.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`)}</span>`;

/** Extensions of marked. Formulas become elements that hold their source; {@link draw} draws them. */
export const formulas = {
  extensions: [
    {
      name: "formulaBlock",
      level: "block",
      start: blockStart,
      tokenizer(text) {
        const found = blockAt(text, 0);
        return found ? { type: "formulaBlock", raw: found[0], formula: found[1], ending: found[2] } : undefined;
      },
      renderer: ({ formula, ending }) => `<p>${span(formula)}${ending}</p>\n`,
    },
    {
      name: "formula",
      level: "inline",
      start: (text) => formulasIn(text).next().value,
      tokenizer(text) {
        const raw = formulaAt(text, 0);
        return raw ? { type: "formula", raw } : undefined;
      },
      renderer: ({ raw }) => span(raw),
    },
  ],
  hooks: {
    // Asterisks and underscores of a formula open and close no emphasis.
    emStrongMask(text) {
      let masked = text;
      for (const index of formulasIn(text)) {
        const { length } = formulaAt(text, index);
        masked = masked.slice(0, index) + "a".repeat(length) + masked.slice(index + length);
      }
      return masked;
    },
  },
};

let katex = null;
const drawings = new Map();

/** Draws the formulas in what was made of an answer: at once, or when KaTeX has come. */
export function draw(fragment) {
  const places = [...fragment.querySelectorAll("span.math")];
  if (!places.length) return;
  if (katex) places.forEach(drawOne);
  else {
    import("./vendor/katex/katex.min.js").then(() => {
      katex = globalThis.katex;
      places.forEach(drawOne);
    });
  }
}

function drawOne(place) {
  const raw = place.textContent;
  place.classList.toggle("display", isDisplay(raw));
  if (!drawings.has(raw)) {
    if (drawings.size >= DRAWINGS_KEPT) drawings.clear();
    drawings.set(raw, drawing(raw));
  }
  const drawn = drawings.get(raw);
  if (drawn) place.replaceChildren(drawn.cloneNode(true));
}

/** @returns {HTMLElement | null} null: KaTeX does not know it, and the source stays. */
function drawing(raw) {
  const element = document.createElement("span");
  try {
    // Elements are made one by one, styles set by script: the page's policy would refuse markup with styles in it.
    katex.render(texOf(raw), element, { displayMode: isDisplay(raw), maxSize: 10, strict: "ignore", trust: false });
  } catch {
    return null; // A mistake of the model, or nested too deeply.
  }
  globalThis.DOMPurify.sanitize(element, DRAWN);
  return element;
}
