// Numbers and sizes in words.

/** Such as "1 page" or "1,200 tokens". */
export function plural(count, noun) {
  return `${count.toLocaleString()} ${noun}${count === 1 ? "" : "s"}`;
}

export function sizeText(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  if (bytes < 1024 ** 2) return `${Math.round(bytes / 1024)} KB`;
  return `${(bytes / 1024 ** 2).toFixed(1)} MB`;
}

const PIECES = { video: "frame", document: "page" };

/** Such as "3 pages, 192 tokens". */
export function costText(kind, { count, tokens }) {
  const pieces = PIECES[kind] ? `${plural(count, PIECES[kind])}, ` : "";
  return pieces + plural(tokens, "token");
}

/** Such as "Reading page 2 of 3". */
export function progressText({ kind, done, total }) {
  return `Reading ${PIECES[kind] ?? "image"} ${Math.min(done + 1, total)} of ${total}`;
}

/** Such as "12 tokens/s, first token after 0.31 s, 84 prompt tokens, 9 generated", with dots between. */
export function statsText(stats) {
  const said = [];
  if (stats.rate) said.push(`${stats.rate < 10 ? stats.rate.toFixed(1) : Math.round(stats.rate)} tokens/s`);
  if (stats.first !== undefined) said.push(`first token after ${stats.first.toFixed(2)} s`);
  if (stats.prompt !== undefined) {
    const cached = stats.cached ? ` (${stats.cached.toLocaleString()} cached)` : "";
    said.push(`${plural(stats.prompt, "prompt token")}${cached}, ${stats.completion.toLocaleString()} generated`);
  }
  if (stats.prompt === undefined && stats.completion) said.push(`${plural(stats.completion, "token")} generated`);
  return said.join(" \u00b7 ");
}
