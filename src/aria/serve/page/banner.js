// Messages about something beside any answer. All can be closed; those that ask nothing of people leave by themselves.

import { $, make } from "./dom.js";

const STAYS = 8000; // ms

let leaving = null;
let shown = null;

export const isShown = () => !$("#banner").hidden;

export function dismiss() {
  clearTimeout(leaving);
  shown = null;
  if ($("#banner").contains(document.activeElement)) $("#question").focus();
  $("#banner").hidden = true;
}

/**
 * @param {string} text
 * @param {{passing?: boolean, action?: [string, () => void]}} options passing: it leaves by itself; action: a button.
 * @returns {() => void} takes this message away, if it is still the one that is shown.
 */
export function tell(text, { passing = false, action = null } = {}) {
  const banner = $("#banner");
  const message = make("p", {}, text);
  const button = (label, click) => make("button.quiet", { type: "button", click }, label);
  clearTimeout(leaving);
  shown = message;
  banner.replaceChildren(message, ...(action ? [button(...action)] : []), button("Close", dismiss));
  banner.hidden = false;
  if (passing) leaving = setTimeout(leave, STAYS);
  return () => shown === message && dismiss();
}

/** Not while somebody points at the message or has its button in focus. */
function leave() {
  if ($("#banner").matches(":hover, :focus-within")) leaving = setTimeout(leave, STAYS);
  else dismiss();
}
