// How answers are sampled, and the system prompt. A conversation has settings of its own where they differ from those
// of new conversations, which this browser keeps.

import { key } from "./api.js";
import { $, make, opened, say } from "./dom.js";

const NAME = "aria-settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const NAMES = ["system", ...NUMBERS];
const LABELS = {
  system: "System prompt", temperature: "Temperature", top_p: "Top p", top_k: "Top k", max_tokens: "Max tokens", seed: "Seed",
};

function kept() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {}; // What cannot be read counts as never written.
  }
}

function keep(settings) {
  localStorage.setItem(NAME, JSON.stringify(settings));
}

const isValid = (name, value) => (name === "system" ? typeof value === "string" && value !== "" : Number.isFinite(value));

/** Settings of a conversation from elsewhere: known names alone. null stands for the server's own value. */
export function validSettings(settings) {
  const named = NAMES.filter((name) => settings?.[name] === null || isValid(name, settings?.[name]));
  return Object.fromEntries(named.map((name) => [name, settings[name]]));
}

/** What a conversation is answered with, of all names; null is the server's own value. */
function effective(conversation) {
  const all = { ...kept(), ...conversation.settings };
  return Object.fromEntries(NAMES.map((name) => [name, isValid(name, all[name]) ? all[name] : null]));
}

/** Names of settings that differ from those of new conversations. */
function changed(conversation) {
  const usual = effective({});
  const now = effective(conversation);
  return NAMES.filter((name) => now[name] !== usual[name]);
}

/** @returns {{system: string, sampling: object}} only what a person has set. */
export function wishes(conversation) {
  const { system, ...numbers } = effective(conversation);
  const sampling = Object.fromEntries(Object.entries(numbers).filter(([, value]) => value !== null));
  return { system: system ?? "", sampling };
}

export function chosenModel() {
  return kept().model ?? null;
}

export function chooseModel(model) {
  keep({ ...kept(), model });
}

/** Marks on the page what is set for this conversation alone. */
export function showChanges(conversation) {
  const now = effective(conversation);
  const said = changed(conversation).map((name) => {
    if (name === "system") return now.system ? LABELS.system : "No system prompt";
    return `${LABELS[name]} ${now[name] ?? "of the server"}`;
  });
  const label = said.length ? `Settings, changed for this conversation: ${said.join(", ")}` : "Settings";
  $("#settings-open").title = label;
  $("#settings-open").setAttribute("aria-label", label);
  $("#settings-open").classList.toggle("changed", said.length > 0);
  $("#changed").hidden = !said.length;
  $("#changed").textContent = said.join(" \u00b7 ");
}

/** @param {() => void} stored called when settings of the conversation have changed. */
export async function openSettings(conversation, stored) {
  const dialog = $("#settings");
  if (dialog.open) return;
  const form = dialog.querySelector("form");
  const fill = () => {
    const now = effective(conversation);
    for (const name of NAMES) form.elements[name].value = now[name] ?? "";
    mark(form, conversation);
  };
  form.oninput = () => {
    const usual = effective({});
    const own = NAMES.map((name) => [name, read(form.elements[name])]);
    conversation.settings = Object.fromEntries(own.filter(([name, value]) => value !== usual[name]));
    mark(form, conversation);
    stored();
  };
  $("#settings-reset").onclick = () => {
    conversation.settings = {};
    fill();
    stored();
  };
  $("#settings-keep").onclick = () => {
    keep({ ...effective(conversation), model: kept().model });
    conversation.settings = {};
    fill();
    stored();
    say("New conversations start with these settings.");
  };
  $("#forget-key").hidden = !key.get();
  $("#forget-key").onclick = () => {
    key.forget();
    $("#forget-key").hidden = true;
    say("The key was forgotten.");
  };
  fill();
  await opened(dialog);
}

/** What a field says; null: nothing, or nothing that can be. */
function read(field) {
  const text = field.value.trim();
  if (!text || !field.validity.valid) return null;
  return field.name === "system" ? text : Number(text);
}

function mark(form, conversation) {
  const names = changed(conversation);
  for (const name of NAMES) {
    const row = form.elements[name].closest("label");
    row.classList.toggle("changed", names.includes(name));
    row.querySelector(".mark-changed")?.remove();
    if (names.includes(name)) form.elements[name].before(make("small.mark-changed", {}, "changed"));
  }
  $("#settings-reset").disabled = $("#settings-keep").disabled = !names.length;
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
