// Conversations out of the browser and back: JSON with media in it, Markdown for reading.

import { save } from "./dom.js";
import { validSettings } from "./settings.js";
import { loadMedium, mediaOf, randomId, saveConversation, saveMedium } from "./store.js";

const FORMAT = "aria-conversations";
const STATES = ["done", "stopped", "interrupted", "failed"];

/** @returns {Promise<string>} data: URI. */
export function dataUri(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error("The browser could not read this file; attach it again."));
    reader.readAsDataURL(blob);
  });
}

function fileName(title, ending) {
  const words = title.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60);
  return `${words || "conversation"}.${ending}`;
}

export async function exportJson(conversations) {
  const media = {};
  for (const id of conversations.flatMap(mediaOf)) media[id] = await dataUri(await loadMedium(id));
  const whole = { format: FORMAT, version: 1, conversations, media };
  const title = conversations.length === 1 ? conversations[0].title : "aria-conversations";
  save(fileName(title, "json"), "application/json", JSON.stringify(whole, null, 1));
}

export function exportMarkdown(conversation) {
  const lines = [`# ${conversation.title}`];
  for (const turn of conversation.turns) {
    lines.push(turn.role === "user" ? "**You**" : `**${turn.model ?? "Aria"}**`);
    for (const item of turn.media ?? []) lines.push(`_Attached: ${item.name}_`);
    if (turn.text) lines.push(turn.text);
    if (turn.error) lines.push(`_${turn.error}_`);
  }
  save(fileName(conversation.title, "md"), "text/markdown", `${lines.join("\n\n")}\n`);
}

/** Conversations of an exported file, saved under new names. Throws an error for people. */
export async function importJson(text) {
  let whole;
  try {
    whole = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON; expected one that this page exported.");
  }
  if (whole?.format !== FORMAT || whole.version !== 1 || !Array.isArray(whole.conversations))
    throw new Error("This file holds no conversations of this page; expected one that it exported as JSON.");
  const read = whole.conversations.map((one) => readConversation(one, whole.media ?? {}));
  for (const { conversation, blobs } of read) {
    for (const [id, uri] of blobs) await saveMedium(id, await blobOf(uri));
    await saveConversation(conversation);
  }
  return read.map(({ conversation }) => conversation);
}

/** Only what the page knows is taken over: the file may come from anywhere. */
function readConversation(one, media) {
  if (!Array.isArray(one?.turns)) throw new Error("A conversation in this file has no turns.");
  const blobs = new Map();
  const turns = readTurns(one.turns, media, blobs);
  const now = Date.now();
  const conversation = {
    id: randomId(), title: String(one.title ?? ""), named: Boolean(one.named), created: Number(one.created) || now,
    updated: Number(one.updated) || now, turns, settings: validSettings(one.settings),
  };
  return { conversation, blobs };
}

function readTurns(turns, media, blobs) {
  return turns.map((turn) => (turn.role === "user" ? readQuestion(turn, media, blobs) : readAnswer(turn, media, blobs)));
}

function readQuestion(turn, media, blobs) {
  const items = (Array.isArray(turn.media) ? turn.media : []).map((item) => {
    const uri = media[item.id];
    if (!["image", "video", "document"].includes(item.kind) || typeof uri !== "string" || !uri.startsWith("data:"))
      throw new Error(`The file ${JSON.stringify(item.name)} is missing in what is imported.`);
    const id = randomId();
    blobs.set(id, uri);
    const thumb = typeof item.thumb === "string" && item.thumb.startsWith("data:image/") ? item.thumb : null;
    const settings = typeof item.settings === "object" && item.settings ? item.settings : {};
    const pages = Number.isInteger(item.pages) ? item.pages : null;
    return { id, kind: item.kind, name: String(item.name), type: String(item.type), size: Number(item.size) || 0, thumb, pages, settings };
  });
  return { role: "user", text: String(turn.text ?? ""), media: items };
}

function readAnswer(turn, media, blobs) {
  const others = (Array.isArray(turn.others) ? turn.others : []).map((other) => {
    const rest = readTurns(Array.isArray(other.rest) ? other.rest : [], media, blobs);
    return { ...readVersion(other), rest };
  });
  const place = Number.isInteger(turn.place) ? Math.min(Math.max(turn.place, 0), others.length) : 0;
  return { role: "assistant", ...readVersion(turn), others, place };
}

function readVersion(turn) {
  const stats = {};
  for (const [name, value] of Object.entries(turn.stats ?? {})) if (Number.isFinite(value)) stats[name] = value;
  return {
    text: String(turn.text ?? ""), state: STATES.includes(turn.state) ? turn.state : "interrupted",
    error: turn.error ? String(turn.error) : null, model: turn.model ? String(turn.model) : null,
    reason: turn.reason ? String(turn.reason) : null, stats,
  };
}

/** Without fetch, which the page's policy keeps to the server itself. */
function blobOf(uri) {
  const comma = uri.indexOf(",");
  const type = /^data:([^;,]*)/.exec(uri)[1];
  return new Blob([Uint8Array.from(atob(uri.slice(comma + 1)), (sign) => sign.charCodeAt(0))], { type });
}
