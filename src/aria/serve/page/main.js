// The page: a list of conversations, the one that is open, and the field for the next message.

import { answer, isGrowing, stop } from "./answers.js";
import { models, onLocked } from "./api.js";
import { Attachments, keep } from "./attachments.js";
import { dismiss, isShown, tell } from "./banner.js";
import { $, make, opened, say } from "./dom.js";
import { askForKey, chooseModel, chosenModel, openSettings, showChanges, wishes } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { deleteConversation, deleteMedia, loadAll, loadMedium, mediaOf, newConversation, saveConversation } from "./store.js";
import { exportJson, importJson } from "./transfer.js";
import { Turns } from "./turns.js";
import { beginVersion, choose, versionOf } from "./versions.js";
import { plural } from "./words.js";

const EXAMPLES = [
  { picture: "samples/word.png", question: "What does it say?", about: "Read a word" },
  { picture: "samples/shapes.png", question: "What is to the left of the square?", about: "Name a shape" },
  { picture: "samples/emoji.png", question: "Which emoji is this?", about: "Recognize an emoji" },
];
const COME_BACK = 4000; // ms between questions whether a server that was away is back

let conversations = [];
let current = newConversation();
let served = [];
/** The question in the open conversation that is being edited. */
let edited = null;
/** Whether a question is on its way into its conversation. */
let sending = false;

const question = $("#question");
const turns = new Turns($("#turns"), $("#scroll"), $("#latest"), {
  retry: guarded(retry), edit: guarded(edit), choose: guarded(chooseVersion),
});
const attachments = new Attachments($("#items"), model, showCost);
const sidebar = new Sidebar({ choose: open, rename, remove, fail: (error) => tell(error.message) });

function model() {
  return served.find(({ id }) => id === $("#model").value) ?? null;
}

// What is shown

function refresh() {
  sidebar.show(conversations, current);
  $("#empty").hidden = current.turns.length > 0;
  $("#turns").hidden = current.turns.length === 0;
  document.title = current.title ? `${current.title} \u2013 Aria` : "Aria";
  const growing = isGrowing(current);
  $("#send").hidden = growing;
  $("#stop").hidden = !growing;
  showChanges(current);
}

function showCost() {
  const { items, tokens, unreadable } = attachments;
  const room = model()?.max_model_len;
  const over = room && tokens !== null && tokens >= room;
  const said = [];
  if (edited) said.push("Editing: what follows this message will be replaced.");
  if (items.length > 1 && tokens !== null) said.push(`${plural(tokens, "token")} in all.`);
  if (over) said.push(`That is more than the ${plural(room, "token")} that this model takes.`);
  if (unreadable.length) {
    const names = unreadable.map(({ item }) => item.name).join(", ");
    said.push(`${names} cannot be read: change ${unreadable.length === 1 ? "its" : "their"} settings or remove ${unreadable.length === 1 ? "it" : "them"} to send the message.`);
  }
  $("#cost").replaceChildren(said.join(" "));
  $("#cost").classList.toggle("wrong", Boolean(over || unreadable.length));
  $("#send").disabled = unreadable.length > 0;
  if (edited) $("#cost").append(" ", make("button.quiet", { type: "button", click: endEdit }, "Cancel"));
}

function fit() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, window.innerHeight * 0.4)}px`;
}

// The server

let waiting = null;
/** Takes away the message that the server is away; null: it is not. */
let back = null;

async function connect() {
  clearTimeout(waiting);
  try {
    served = await models();
  } catch (error) {
    // Shown once: a person who closed the message need not close it again.
    back ??= tell(error.message, { action: ["Try again", connectAnew] });
    // Without its key the server would ask for it again and again.
    if (error.status !== 401) waiting = setTimeout(connect, COME_BACK);
    return;
  }
  back?.();
  back = null;
  const chosen = $("#model").value || chosenModel();
  $("#model").replaceChildren(...served.map(({ id }) => make("option", { value: id }, id)));
  $("#model").value = served.some(({ id }) => id === chosen) ? chosen : served[0].id;
  attachments.askAll();
}

function connectAnew() {
  back = null;
  return connect();
}

// Conversations

function open(conversation) {
  endEdit();
  current = conversation;
  sidebar.open(false);
  refresh();
  turns.show(current.turns);
  question.focus();
}

async function rename(conversation, title) {
  Object.assign(conversation, { title, named: true });
  await saveConversation(conversation);
  refresh();
}

async function remove(conversation) {
  stop(conversation);
  conversation.removed = true;
  conversations = conversations.filter((other) => other !== conversation);
  await deleteConversation(conversation);
  if (conversation === current) open(newConversation());
  else refresh();
  say("Conversation deleted.");
}

function titleOf({ text, media }) {
  const words = text.trim().replace(/\s+/g, " ") || media.map(({ name }) => name).join(", ");
  return words.length > 60 ? `${words.slice(0, 59)}\u2026` : words;
}

// Questions and answers

async function send() {
  const conversation = current;
  if (sending || isGrowing(conversation)) return;
  const before = mediaOf(conversation);
  sending = true;
  try {
    if (!(await isReady(conversation))) return;
    await putQuestion(conversation);
  } finally {
    sending = false;
  }
  const kept = mediaOf(conversation);
  await reply(conversation);
  await deleteMedia(before.filter((id) => !kept.includes(id)));
}

/** Whether there is something to send that the server can read. Who goes elsewhere while it looks sends nothing. */
async function isReady(conversation) {
  const isEmpty = () => !question.value.trim() && !attachments.items.length;
  if (isEmpty()) return false;
  await attachments.checked();
  if (attachments.unreadable.length) say($("#cost").textContent);
  return current === conversation && !attachments.unreadable.length && !isEmpty();
}

/** Takes the question out of the field and into the conversation. */
async function putQuestion(conversation) {
  const text = question.value.trim();
  const replaced = edited;
  const taken = attachments.clear();
  edited = null;
  question.value = "";
  fit();
  showCost();
  try {
    ask(conversation, replaced, { role: "user", text, media: await keep(taken) });
  } catch (error) {
    question.value = text;
    edited = replaced;
    attachments.restore(taken);
    throw error;
  }
}

/** Adds a question, in place of an edited one and all that followed it. */
function ask(conversation, replaced, turn) {
  if (replaced) conversation.turns.splice(conversation.turns.indexOf(replaced));
  conversation.turns.push(turn);
  if (!conversation.named) conversation.title = titleOf(conversation.turns[0]);
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  if (conversation !== current) return;
  if (replaced) turns.show(conversation.turns);
  else turns.update(turn);
}

/** @param {object | null} version an empty version of an answer, which is to be filled; null: a new turn. */
async function reply(conversation, version = null) {
  const chosen = model()?.id ?? chosenModel() ?? undefined;
  await answer(conversation, version, { model: chosen, ...wishes(conversation) }, (turn, progress) => {
    if (progress) {
      if (conversation === current) turns.progress(turn, progress);
      return;
    }
    if (turn.state !== "growing" || !turn.text) refresh();
    if (conversation === current) turns.update(turn);
    if (turn.state === "done" && conversation === current) say(`Answer: ${turn.text}`);
    if (turn.state === "stopped") say("Stopped.");
  });
}

async function retry(turn) {
  if (sending || isGrowing(current)) return;
  beginVersion(current, turn);
  turns.change(turn);
  turns.follow.toEnd();
  await reply(current, turn);
}

async function chooseVersion(turn, place) {
  if (sending || isGrowing(current)) return;
  choose(current, turn, place);
  turns.change(turn);
  say(`Version ${place + 1} of ${versionOf(turn).count}`);
  await saveConversation(current);
}

/** Settings of the open conversation were changed; one that has not begun is saved with its first question. */
async function settingsChanged() {
  showChanges(current);
  if (conversations.includes(current)) await saveConversation(current);
}

const showSettings = () => openSettings(current, guarded(settingsChanged));

async function edit(turn) {
  if (sending || isGrowing(current)) return;
  endEdit();
  edited = turn;
  question.value = turn.text;
  fit();
  for (const item of turn.media) {
    attachments.put({ ...item, settings: { ...item.settings } }, await loadMedium(item.id), true);
  }
  showCost();
  question.focus();
}

function endEdit() {
  if (!edited) return;
  edited = null;
  question.value = "";
  attachments.clear();
  fit();
}

function attach(files) {
  const refused = attachments.add(files);
  if (refused.length) tell(`${refused.join(", ")}: Aria reads pictures, clips and PDFs.`, { passing: true });
}

async function tryExample({ picture, question: text }) {
  const blob = await (await fetch(picture)).blob();
  attachments.add([new File([blob], picture.split("/").pop(), { type: "image/png" })], { detail: "low" });
  question.value = text;
  await send();
}

/** Work whose failure a person should read. */
function guarded(work) {
  return async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      tell(error.message);
    }
  };
}

// What people do

function listenToFiles() {
  $("#attach").addEventListener("click", () => $("#files").click());
  $("#files").addEventListener("change", () => {
    attach($("#files").files);
    $("#files").value = "";
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    attach(event.clipboardData.files);
  });
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  let over = 0;
  const cover = (change) => (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    over += change;
    $("#drop").hidden = over <= 0;
  };
  document.addEventListener("dragenter", cover(1));
  document.addEventListener("dragover", cover(0));
  document.addEventListener("dragleave", cover(-1));
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    over = 0;
    $("#drop").hidden = true;
    attach(event.dataTransfer.files);
  });
}

function listenToKeys() {
  // On touch keyboards Enter is the only way to a new line.
  const touch = window.matchMedia("(pointer: coarse)").matches;
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
      event.preventDefault();
      guarded(send)();
    } else if (event.key === "ArrowUp" && !question.value && !attachments.items.length) {
      const last = current.turns.findLast((turn) => turn.role === "user");
      if (last) {
        event.preventDefault();
        guarded(edit)(last);
      }
    }
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    const held = event.ctrlKey || event.metaKey;
    const pressed = event.key.toLowerCase();
    if (event.isComposing) return;
    if (event.key === "Escape" && sidebar.closeMenu()) event.preventDefault();
    else if (event.key === "Escape" && sidebar.isOpen) sidebar.open(false);
    else if (event.key === "Escape" && isGrowing(current)) stop(current);
    else if (event.key === "Escape" && edited) endEditAndTell();
    else if (event.key === "Escape" && isShown()) dismiss();
    else if (held && event.shiftKey && pressed === "o") open(newConversation());
    else if (held && pressed === "k") search();
    else if (held && pressed === ",") showSettings();
    else if (held && pressed === "/") opened($("#shortcuts"));
    else return;
    event.preventDefault();
  });
}

function endEditAndTell() {
  endEdit();
  showCost();
}

function search() {
  sidebar.open(true);
  $("#search").focus();
}

function listenToButtons() {
  $("#composer").addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(send)();
  });
  question.addEventListener("input", fit);
  $("#stop").addEventListener("click", () => stop(current));
  $("#new").addEventListener("click", () => open(newConversation()));
  $("#model").addEventListener("change", () => {
    chooseModel($("#model").value);
    attachments.askAll();
  });
  $("#settings-open").addEventListener("click", showSettings);
  $("#changed").addEventListener("click", showSettings);
  $("#shortcuts-open").addEventListener("click", () => opened($("#shortcuts")));
  $("#export-all").addEventListener("click", guarded(() => exportJson(conversations)));
  $("#import").addEventListener("click", () => $("#import-file").click());
  $("#import-file").addEventListener("change", guarded(async () => {
    const [file] = $("#import-file").files;
    $("#import-file").value = "";
    const read = await importJson(await file.text());
    conversations = [...read, ...conversations].sort((one, other) => other.updated - one.updated);
    if (read.length) open(read[0]);
    say(`${plural(read.length, "conversation")} imported.`);
  }));
  $("#examples").append(...EXAMPLES.map((example) => make("li", {},
    make("button.example", { type: "button", click: guarded(() => tryExample(example)) },
      make("img", { src: example.picture, alt: "", width: 96, height: 96 }),
      make("span", {}, make("small", {}, example.about), example.question)))));
}

async function start() {
  onLocked(askForKey);
  listenToButtons();
  listenToFiles();
  listenToKeys();
  turns.show(current.turns);
  refresh();
  try {
    conversations = await loadAll();
  } catch (error) {
    tell(`This browser cannot store conversations for this page: ${error.message}`);
  }
  const last = sessionStorage.getItem("aria-open");
  const found = conversations.find(({ id }) => id === last);
  if (found) open(found);
  refresh();
  window.addEventListener("pagehide", () => sessionStorage.setItem("aria-open", current.id));
  await connect();
}

start();
