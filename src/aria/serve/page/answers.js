// Answers as they grow: asked, stopped, measured and kept.

import { countTokens, stream } from "./api.js";
import { messagesOf } from "./parts.js";
import { saveConversation } from "./store.js";
import { blank } from "./versions.js";

const SAVE_EVERY = 1000; // ms

/** Conversation id -> what stops its answer. */
const growing = new Map();

export const isGrowing = (conversation) => growing.has(conversation.id);

export function stop(conversation) {
  growing.get(conversation.id)?.abort();
}

/**
 * Asks for an answer to the turns so far.
 * @param {object} conversation its last turn is a question, or the turn that the answer is for.
 * @param {object | null} turn an empty version of an answer; null: the answer is a new turn.
 * @param {{model: string, system: string, sampling: object}} wishes
 * @param {(turn: object, progress?: object) => void} grew called at the start, at every piece and at the end; with
 *     progress while the server reads media.
 */
export async function answer(conversation, turn, wishes, grew) {
  const before = conversation.turns.filter((other) => other !== turn);
  if (turn) turn.model = wishes.model;
  else conversation.turns.push((turn = { role: "assistant", ...blank(wishes.model) }));
  const halt = new AbortController();
  growing.set(conversation.id, halt);
  conversation.updated = Date.now();
  grew(turn);
  const clock = { start: performance.now(), first: null, last: null };
  try {
    await saveConversation(conversation);
    const messages = await messagesOf(before, wishes.system);
    await grow(conversation, turn, { model: wishes.model, messages, ...wishes.sampling }, halt.signal, clock, grew);
    turn.state = "done";
  } catch (error) {
    turn.state = halt.signal.aborted ? "stopped" : "failed";
    if (turn.state === "failed") turn.error = error.message;
  } finally {
    growing.delete(conversation.id);
    conversation.updated = Date.now();
    grew(turn);
    if (turn.state === "stopped" && turn.text) await count(turn, clock, grew);
    // One that was deleted meanwhile stays so.
    if (!conversation.removed) await saveConversation(conversation);
  }
}

async function grow(conversation, turn, body, signal, clock, grew) {
  let saved = clock.start;
  for await (const chunk of stream(body, signal)) {
    if (chunk.progress) grew(turn, chunk.progress);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      clock.last = performance.now();
      clock.first ??= clock.last;
      turn.text += choice.delta.content;
      turn.stats.first = (clock.first - clock.start) / 1000;
      grew(turn);
    }
    turn.reason = choice?.finish_reason ?? turn.reason;
    if (chunk.usage) {
      const { prompt_tokens: prompt, completion_tokens: completion, prompt_tokens_details: details } = chunk.usage;
      Object.assign(turn.stats, { prompt, completion, cached: details?.cached_tokens ?? 0, rate: rate(completion, clock) });
    }
    if (performance.now() - saved > SAVE_EVERY) {
      saved = performance.now();
      await saveConversation(conversation);
    }
  }
}

/** Tokens a second. The first one came with the prompt's work: the rate is that of those after it. */
function rate(completion, { first, last }) {
  return last > first && completion > 1 ? ((completion - 1) * 1000) / (last - first) : undefined;
}

/** A stream that was stopped tells no usage: what it wrote is counted afterwards. */
async function count(turn, clock, grew) {
  try {
    turn.stats.completion = await countTokens(turn.model, turn.text);
  } catch {
    return; // The answer stands without its numbers.
  }
  turn.stats.rate = rate(turn.stats.completion, clock);
  grew(turn);
}
