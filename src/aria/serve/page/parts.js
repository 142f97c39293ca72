// Turns of a conversation -> messages as /v1/chat/completions and /tokenize take them.

import { loadMedium } from "./store.js";
import { dataUri } from "./transfer.js";

/** A content part of a medium. @param {string} uri its data: URI. */
export function partOf(item, uri) {
  const { detail, split, frames, pages } = item.settings;
  if (item.kind === "image") return { type: "image_url", image_url: given({ url: uri, detail, split }) };
  if (item.kind === "video") return { type: "video_url", video_url: given({ url: uri, detail, num_frames: frames }) };
  return { type: "file", file: given({ file_data: uri, filename: item.name, pages, detail, split }) };
}

/** The fields that say something: the server has its own values for the others. */
function given(fields) {
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined && value !== ""));
}

/** @returns {Promise<object[]>} the messages of turns, after a system prompt if there is one. */
export async function messagesOf(turns, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const [place, turn] of turns.entries()) {
    // A question that was refused would be refused again with every later one.
    if (isRefused(turns[place + 1])) continue;
    if (turn.role === "user") messages.push({ role: "user", content: await contentOf(turn) });
    else if (turn.text) messages.push({ role: "assistant", content: turn.text });
  }
  return messages;
}

const isRefused = (turn) => turn?.state === "failed" && !turn.text;

async function contentOf(turn) {
  if (!turn.media.length) return turn.text;
  const parts = [];
  for (const item of turn.media) parts.push(partOf(item, await dataUri(await loadMedium(item.id))));
  if (turn.text) parts.push({ type: "text", text: turn.text });
  return parts;
}
