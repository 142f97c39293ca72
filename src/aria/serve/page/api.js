// What the page asks the server: the public routes, with the key where there is one, and errors for people.

const NAME = "aria-key";

export class ServerError extends Error {
  /** @param {number} status HTTP status; 0: the server did not answer. */
  constructor(message, status) {
    // The server names media by how they were sent; people know them as files.
    super(message.replace(/'data:[^']*'/g, "This file"));
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME),
  /** @param {boolean} keep whether it outlives the tab. */
  set(value, keep) {
    key.forget();
    (keep ? localStorage : sessionStorage).setItem(NAME, value);
  },
  forget() {
    sessionStorage.removeItem(NAME);
    localStorage.removeItem(NAME);
  },
};

let askForKey = async () => false;
let asked = null;

/** @param {(why: string) => Promise<boolean>} ask asks a person for the key; false: there is none. */
export function onLocked(ask) {
  askForKey = ask;
}

/** Several requests may be refused for want of a key at once; the person is asked once. */
function unlock(why) {
  asked ??= askForKey(why).finally(() => (asked = null));
  return asked;
}

async function request(path, options = {}) {
  const used = key.get();
  const headers = { ...options.headers };
  if (used) headers.Authorization = `Bearer ${used}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not respond. It may have been stopped, or the network is down.", 0);
  }
  if (response.ok) return response;
  const why = await reason(response);
  // Another request may have been given the key meanwhile.
  if (response.status === 401 && (key.get() !== used || (await unlock(why)))) return request(path, options);
  throw new ServerError(why, response.status);
}

async function reason(response) {
  let said;
  try {
    said = (await response.json()).error?.message;
  } catch {
    // A proxy's page, or a connection that broke: the status has to do.
  }
  const wait = response.headers.get("Retry-After");
  const again = wait ? ` Try again in ${wait} s.` : "";
  return (said ?? `The server answered ${response.status} ${response.statusText}`.trim()) + again;
}

const post = (path, body, signal) =>
  request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });

/** @returns {Promise<{id: string, max_model_len?: number}[]>} */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/**
 * What messages cost, and small pictures of their media.
 * @param {(update: {kind: string, done: number, total: number}) => void} progress called while media are read.
 * @returns {Promise<{count: number, media: {kind: string, count: number, tokens: number, preview?: string, total?: number}[]}>}
 */
export async function tokenize(model, messages, { signal, progress }) {
  const response = await post("tokenize", { model, messages, stream: true, return_previews: true }, signal);
  let counted = null;
  for await (const one of pieces(response)) {
    if (one.progress) progress(one.progress);
    else counted = one;
  }
  return counted;
}

/** How many tokens a text is. @returns {Promise<number>} */
export async function countTokens(model, text) {
  return (await (await post("tokenize", { model, prompt: text })).json()).count;
}

/** The chunks of a streamed answer, one by one. */
export async function* stream(body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true, include_progress: true } };
  yield* pieces(await post("v1/chat/completions", whole, signal));
}

/** What the events of a stream hold, up to its end. */
async function* pieces(response) {
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const piece = JSON.parse(data);
    if (piece.error) throw new ServerError(piece.error.message, piece.error.type === "invalid_request_error" ? 400 : 500);
    yield piece;
  }
  if (!ended) throw new ServerError("The connection was lost before the answer was complete.", 0);
}

/** The data of server-sent events, as they come: events end with an empty line, lines with LF or CRLF. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection was lost before the answer was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});  // What has ended or broken needs no cancelling.
  }
}
