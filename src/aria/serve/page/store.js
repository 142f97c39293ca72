// Conversations in this browser (IndexedDB), media included.
//
// A conversation is {id, title, named, created, updated, turns, settings?}. A turn is
//   {role: "user", text, media: [{id, kind, name, type, size, thumb, settings}]}, or
//   {role: "assistant", text, state, error, model, reason, stats, others?, place?}: see versions.js.
// Its settings are those that differ from the ones of new conversations: see settings.js.
// The bytes of media lie apart, by id, so that a conversation is saved quickly while an answer grows.

import { allTurns } from "./versions.js";

const VERSION = 1;

let opening = null;

function database() {
  opening ??= new Promise((done, failed) => {
    const request = indexedDB.open("aria", VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("media");
    };
    request.onsuccess = () => done(request.result);
    request.onerror = () => failed(request.error);
  });
  return opening;
}

/** Runs one transaction; resolves, when it is complete, to what the request asked. */
async function transact(stores, mode, work) {
  const transaction = (await database()).transaction(stores, mode);
  return new Promise((done, failed) => {
    const request = work(transaction);
    transaction.oncomplete = () => done(request?.result);
    transaction.onabort = () => failed(transaction.error);
    transaction.onerror = () => failed(transaction.error);
  });
}

export function newConversation() {
  const now = Date.now();
  return { id: randomId(), title: "", named: false, created: now, updated: now, turns: [] };
}

/** Not `crypto.randomUUID`: it is missing on plain http from another computer. */
export function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** All conversations, the latest first. Answers that were growing when the page went are marked. */
export async function loadAll() {
  const all = await transact(["conversations"], "readonly", (open) => open.objectStore("conversations").getAll());
  for (const conversation of all) {
    for (const turn of allTurns(conversation.turns)) {
      if (turn.state === "growing") turn.state = "interrupted";
    }
  }
  return all.sort((one, other) => other.updated - one.updated);
}

export function saveConversation(conversation) {
  return transact(["conversations"], "readwrite", (open) => open.objectStore("conversations").put(conversation));
}

/** Removes a conversation and the media that only it has. */
export function deleteConversation(conversation) {
  return transact(["conversations", "media"], "readwrite", (open) => {
    open.objectStore("conversations").delete(conversation.id);
    for (const id of mediaOf(conversation)) open.objectStore("media").delete(id);
  });
}

/** @param {Blob} blob */
export function saveMedium(id, blob) {
  return transact(["media"], "readwrite", (open) => open.objectStore("media").put(blob, id));
}

export function deleteMedia(ids) {
  return transact(["media"], "readwrite", (open) => {
    for (const id of ids) open.objectStore("media").delete(id);
  });
}

/** @returns {Promise<Blob>} */
export async function loadMedium(id) {
  const blob = await transact(["media"], "readonly", (open) => open.objectStore("media").get(id));
  if (!blob) throw new Error("This file is no longer kept in the browser; attach it again.");
  return blob;
}

export function mediaOf(conversation) {
  return [...allTurns(conversation.turns)].flatMap((turn) => (turn.media ?? []).map((item) => item.id));
}
