// Dark or light: the system's choice until a person makes another one, which this browser keeps.
// A plain script in the head, not a module: it runs before anything is drawn in the wrong colours.
"use strict";

(() => {
  const NAME = "aria-theme";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const systems = () => (dark.matches ? "dark" : "light");

  function theme() {
    const kept = localStorage.getItem(NAME);
    return ["dark", "light"].includes(kept) ? kept : systems();
  }

  function show() {
    document.documentElement.dataset.theme = theme();
    const button = document.querySelector("#theme");
    if (!button) return; // The head is read before the body.
    const label = theme() === "dark" ? "Light colours" : "Dark colours";
    button.title = label;
    button.setAttribute("aria-label", label);
  }

  /** To the other one. Back at the system's, nothing is kept: the page follows it again. */
  function change() {
    const next = theme() === "dark" ? "light" : "dark";
    if (next === systems()) localStorage.removeItem(NAME);
    else localStorage.setItem(NAME, next);
    show();
  }

  dark.addEventListener("change", show);
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelector("#theme").addEventListener("click", change);
    show();
  });
  show();
})();
