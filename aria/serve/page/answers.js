// Answers as they grow: asked, stopped, measured and kept.

import { stream } from "./api.js";
import { messagesOf } from "./parts.js";
import { saveConversation } from "./store.js";

const SAVE_EVERY = 1000; // ms

/** Conversation id -> what stops its answer. */
const growing = new Map();

export const isGrowing = (conversation) => growing.has(conversation.id);

export function stop(conversation) {
  growing.get(conversation.id)?.abort();
}

/**
 * Asks for an answer to the turns so far, as a new last turn.
 * @param {object} conversation its last turn is a question.
 * @param {{model: string, system: string, sampling: object}} wishes
 * @param {(turn: object) => void} grew called at the start, at every piece and at the end.
 */
export async function answer(conversation, wishes, grew) {
  const turn = { role: "assistant", text: "", state: "growing", error: null, model: wishes.model, reason: null, stats: {} };
  const before = [...conversation.turns];
  const halt = new AbortController();
  growing.set(conversation.id, halt);
  conversation.turns.push(turn);
  conversation.updated = Date.now();
  grew(turn);
  try {
    await saveConversation(conversation);
    const messages = await messagesOf(before, wishes.system);
    await grow(conversation, turn, { model: wishes.model, messages, ...wishes.sampling }, halt.signal, grew);
    turn.state = "done";
  } catch (error) {
    turn.state = halt.signal.aborted ? "stopped" : "failed";
    if (turn.state === "failed") turn.error = error.message;
  } finally {
    growing.delete(conversation.id);
    conversation.updated = Date.now();
    grew(turn);
    // One that was deleted meanwhile stays so.
    if (!conversation.removed) await saveConversation(conversation);
  }
}

async function grow(conversation, turn, body, signal, grew) {
  const start = performance.now();
  let first = null;
  let last = null;
  let saved = start;
  for await (const chunk of stream(body, signal)) {
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      last = performance.now();
      first ??= last;
      turn.text += choice.delta.content;
      turn.stats.first = (first - start) / 1000;
      grew(turn);
    }
    turn.reason = choice?.finish_reason ?? turn.reason;
    if (chunk.usage) Object.assign(turn.stats, counted(chunk.usage, first, last));
    if (performance.now() - saved > SAVE_EVERY) {
      saved = performance.now();
      await saveConversation(conversation);
    }
  }
}

/** The first token came with the prompt's work: the rate is that of those after it. */
function counted(usage, first, last) {
  const stats = { prompt: usage.prompt_tokens, completion: usage.completion_tokens };
  const cached = usage.prompt_tokens_details?.cached_tokens;
  if (cached) stats.cached = cached;
  if (last > first && usage.completion_tokens > 1) stats.rate = ((usage.completion_tokens - 1) * 1000) / (last - first);
  return stats;
}
