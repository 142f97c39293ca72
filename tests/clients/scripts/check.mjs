// Shared by the scripts for Node.js; check.py documents it.
import { readFileSync } from "node:fs";
import { isDeepStrictEqual } from "node:util";

const [address, key] = process.argv.slice(2);
const pictures = new URL("../../../examples/pictures/", import.meta.url);

export const BASE_URL = `${address}/v1`;
export const KEY = key;
export const MODEL = "aria-nano";
export const GREETING = "Hello! Show me a picture.";
export const THANKS = "Thank you.";
export const WELCOME = "You are welcome.";
export const READ = "What does it say?";
export const CIRCLE = "What colour is the circle?";
export const TOO_LONG = "x".repeat(5000);
export const WORD = readFileSync(new URL("word.png", pictures));
export const SHAPES = readFileSync(new URL("shapes.png", pictures));

export const uri = (picture) => `data:image/png;base64,${picture.toString("base64")}`;

export function equal(found, expected) {
  if (!isDeepStrictEqual(found, expected)) {
    throw new Error(`${JSON.stringify(found)}; expected ${JSON.stringify(expected)}`);
  }
}

export async function rejects(call) {
  const result = await Promise.resolve()
    .then(call)
    .then(
      (value) => ({ value }),
      (error) => ({ error }),
    );
  if (!("error" in result)) throw new Error(`no error, but ${JSON.stringify(result.value)}`);
  return result.error;
}

export async function report(checks) {
  const outcomes = {};
  for (const [name, check] of Object.entries(checks)) {
    try {
      await check();
      outcomes[name] = "passes";
    } catch (error) {
      console.error(error);
      outcomes[name] = String(error);
    }
  }
  console.log(JSON.stringify(outcomes));
}
