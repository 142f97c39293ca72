// How answers are sampled, and the system prompt: kept in this browser.

import { key } from "./api.js";
import { $, opened, say } from "./dom.js";

const NAME = "aria-settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

function kept() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {}; // What cannot be read counts as never written.
  }
}

/** @returns {{system: string, sampling: object}} only what a person has set. */
export function wishes() {
  const settings = kept();
  const set = NUMBERS.filter((name) => Number.isFinite(settings[name]));
  return { system: settings.system ?? "", sampling: Object.fromEntries(set.map((name) => [name, settings[name]])) };
}

export function chosenModel() {
  return kept().model ?? null;
}

export function chooseModel(model) {
  localStorage.setItem(NAME, JSON.stringify({ ...kept(), model }));
}

export async function openSettings() {
  const dialog = $("#settings");
  if (dialog.open) return;
  const form = dialog.querySelector("form");
  const settings = kept();
  for (const name of ["system", ...NUMBERS]) form.elements[name].value = settings[name] ?? "";
  $("#forget-key").hidden = !key.get();
  const store = () => {
    const now = { model: kept().model, system: form.elements.system.value.trim() };
    for (const name of NUMBERS) {
      const field = form.elements[name];
      if (field.value && field.validity.valid) now[name] = Number(field.value);
    }
    localStorage.setItem(NAME, JSON.stringify(now));
  };
  form.oninput = store;
  $("#settings-reset").onclick = () => {
    form.reset();
    store();
  };
  $("#forget-key").onclick = () => {
    key.forget();
    $("#forget-key").hidden = true;
    say("The key is forgotten.");
  };
  await opened(dialog);
}

/** Asks for the API key. @returns {Promise<boolean>} whether there is one now. */
export async function askForKey(why) {
  const form = $("#locked form");
  form.reset();
  // Without a key the title says it all.
  $("#locked-why").textContent = key.get() ? `The server says: ${why}.` : "";
  const chosen = await opened($("#locked"));
  const value = form.elements.key.value.trim();
  if (chosen !== "use" || !value) return false;
  key.set(value, form.elements.keep.checked);
  return true;
}
