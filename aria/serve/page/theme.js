// Dark or light: the system's choice until a person makes another one, which this browser keeps.
// It runs before the rest of the page, so that nothing flashes in the wrong colours for long.

const NAMES = ["system", "light", "dark"];

export function theme() {
  const kept = localStorage.getItem("aria-theme");
  return NAMES.includes(kept) ? kept : "system";
}

/** system -> light -> dark -> system; returns the new one. */
export function nextTheme() {
  const name = NAMES[(NAMES.indexOf(theme()) + 1) % NAMES.length];
  localStorage.setItem("aria-theme", name);
  show();
  return name;
}

function show() {
  const name = theme();
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const button = document.querySelector("#theme");
  if (button) {
    button.title = `Theme: ${name}`;
    button.setAttribute("aria-label", `Theme: ${name}. Change`);
  }
}

show();
