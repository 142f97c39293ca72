// Vercel's ai, with its providers for OpenAI-compatible servers (chat completions) and for OpenAI (responses).
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";
import { BASE_URL, CIRCLE, GREETING, KEY, MODEL, READ, SHAPES, THANKS, TOO_LONG, WELCOME, WORD } from "./check.mjs";
import { equal, rejects, report } from "./check.mjs";

const settings = { baseURL: BASE_URL, apiKey: KEY };
const compatible = createOpenAICompatible({
  name: "aria",
  supportsStructuredOutputs: true,
  includeUsage: true,
  ...settings,
});
const models = [compatible(MODEL), createOpenAI(settings)(MODEL)];
const Paint = z.object({ colour: z.enum(["red", "green", "blue"]) });
const paint = tool({ description: "Report a colour.", inputSchema: Paint, execute: async () => "Noted." });
const about = (picture, question) => [
  {
    role: "user",
    content: [
      { type: "image", image: picture },
      { type: "text", text: question },
    ],
  },
];
const each = (check) => async () => {
  // The server keeps no conversations, so that the client has to send their messages rather than name them.
  for (const model of models) await check({ model, maxRetries: 0, providerOptions: { openai: { store: false } } });
};

await report({
  chat: each(async (settings) => {
    const { text, response } = await generateText({ ...settings, prompt: "Hello" });
    equal(text, GREETING);
    const messages = [{ role: "user", content: "Hello" }, ...response.messages, { role: "user", content: THANKS }];
    equal((await generateText({ ...settings, messages })).text, WELCOME);
  }),
  stream: each(async (settings) => {
    const pieces = [];
    for await (const piece of streamText({ ...settings, prompt: "Hello" }).textStream) pieces.push(piece);
    equal(pieces.join(""), GREETING);
    equal(pieces.length > 3, true);
  }),
  image: each(async (settings) => {
    equal((await generateText({ ...settings, messages: about(WORD, READ) })).text, "Welcome");
  }),
  tools: each(async (settings) => {
    const asked = { ...settings, messages: about(SHAPES, CIRCLE), tools: { paint } };
    const { toolCalls, response } = await generateText({ ...asked, toolChoice: "required" });
    equal(
      toolCalls.map((call) => [call.toolName, call.input]),
      [["paint", { colour: "red" }]],
    );
    const messages = [...asked.messages, ...response.messages, { role: "user", content: THANKS }];
    equal((await generateText({ ...asked, messages })).text, WELCOME);
    const streamed = streamText({ ...asked, toolChoice: { type: "tool", toolName: "paint" } });
    equal(
      (await streamed.toolCalls).map((call) => call.input),
      [{ colour: "red" }],
    );
  }),
  structured: each(async (settings) => {
    const asked = { ...settings, messages: about(SHAPES, CIRCLE), output: Output.object({ schema: Paint }) };
    equal((await generateText(asked)).output, { colour: "red" });
    equal(await streamText(asked).output, { colour: "red" });
  }),
  errors: each(async (settings) => {
    const error = await rejects(() => generateText({ ...settings, prompt: TOO_LONG }));
    equal([APICallError.isInstance(error), error.statusCode, error.isRetryable], [true, 400, false]);
    equal(JSON.parse(error.responseBody).error.code, "context_length_exceeded");
  }),
  usage: each(async (settings) => {
    const { usage } = await generateText({ ...settings, prompt: "Hello" });
    equal([usage.inputTokens > 5, usage.outputTokens > 5], [true, true]);
    const streamed = await streamText({ ...settings, prompt: "Hello" }).usage;
    equal(streamed.totalTokens, usage.totalTokens);
  }),
});
