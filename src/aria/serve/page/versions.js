// Versions of an answer. The one that is shown lies in the turn itself; the others lie beside it, each with the turns
// that followed it, so that a conversation always reads as it was written.

const OWN = ["text", "state", "error", "model", "reason", "stats"];

export const blank = (model) => ({ text: "", state: "growing", error: null, model, reason: null, stats: {} });

/** All turns of a conversation, those of versions that are not shown included. */
export function* allTurns(turns) {
  for (const turn of turns) {
    yield turn;
    for (const other of turn.others ?? []) {
      yield other;
      yield* allTurns(other.rest);
    }
  }
}

/** @returns {{place: number, count: number}} which version is shown (from 0), of how many. */
export function versionOf(turn) {
  return { place: turn.place ?? 0, count: (turn.others?.length ?? 0) + 1 };
}

/** Takes the version that is shown, and what follows it, out of the conversation. @returns {object[]} all versions. */
function takeOut(conversation, turn) {
  const shown = Object.fromEntries(OWN.map((name) => [name, turn[name]]));
  shown.rest = conversation.turns.splice(conversation.turns.indexOf(turn) + 1);
  return (turn.others ?? []).toSpliced(versionOf(turn).place, 0, shown);
}

/** Shows another version of an answer, and what followed that. */
export function choose(conversation, turn, place) {
  const others = takeOut(conversation, turn);
  const [{ rest, ...chosen }] = others.splice(place, 1);
  Object.assign(turn, chosen, { others, place });
  conversation.turns.push(...rest);
}

/** Makes place for a new version of an answer, which then ends the conversation. Failures without a word are dropped. */
export function beginVersion(conversation, turn) {
  const others = takeOut(conversation, turn).filter(({ text, rest }) => text || rest.length);
  Object.assign(turn, blank(turn.model), { others, place: others.length });
}
