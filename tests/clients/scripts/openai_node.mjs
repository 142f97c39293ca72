// OpenAI's client for Node.js: chat completions and responses.
import OpenAI from "openai";
import { zodResponseFormat, zodFunction } from "openai/helpers/zod";
import { z } from "zod";
import { BASE_URL, CIRCLE, GREETING, KEY, MODEL, READ, SHAPES, THANKS, TOO_LONG, WELCOME, WORD } from "./check.mjs";
import { equal, rejects, report, uri } from "./check.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0 });
const hello = [{ role: "user", content: "Hello" }];
const Paint = z.object({ colour: z.enum(["red", "green", "blue"]) });
const about = (picture, question) => [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: uri(picture) } },
      { type: "text", text: question },
    ],
  },
];

await report({
  async chat() {
    const answer = await client.chat.completions.create({ model: MODEL, messages: hello });
    const { message } = answer.choices[0];
    equal(message.content, GREETING);
    const again = [...hello, message, { role: "user", content: THANKS }];
    const next = await client.chat.completions.create({ model: MODEL, messages: again });
    equal(next.choices[0].message.content, WELCOME);
    equal((await client.responses.create({ model: MODEL, input: "Hello" })).output_text, GREETING);
  },
  async stream() {
    const pieces = [];
    const stream = client.chat.completions.stream({ model: MODEL, messages: hello });
    stream.on("content", (piece) => pieces.push(piece));
    equal(await stream.finalContent(), GREETING);
    equal(pieces.join(""), GREETING);
    const answer = await client.responses.stream({ model: MODEL, input: "Hello" }).finalResponse();
    equal(answer.output_text, GREETING);
  },
  async image() {
    const answer = await client.chat.completions.create({ model: MODEL, messages: about(WORD, READ) });
    equal(answer.choices[0].message.content, "Welcome");
  },
  async tools() {
    const paint = zodFunction({ name: "paint", parameters: Paint });
    const messages = about(SHAPES, CIRCLE);
    const asked = { model: MODEL, messages, tools: [paint], tool_choice: "required" };
    const { message } = (await client.chat.completions.parse(asked)).choices[0];
    equal(message.tool_calls[0].function.parsed_arguments, { colour: "red" });
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "Noted." };
    const again = [...messages, message, result, { role: "user", content: THANKS }];
    const answer = await client.chat.completions.create({ model: MODEL, messages: again, tools: [paint] });
    equal(answer.choices[0].message.content, WELCOME);
    const streamed = await client.chat.completions.stream(asked).finalMessage();
    equal(streamed.tool_calls[0].function.parsed_arguments, { colour: "red" });
  },
  async structured() {
    const format = zodResponseFormat(Paint, "paint");
    const asked = { model: MODEL, messages: about(SHAPES, CIRCLE), response_format: format };
    const answer = await client.chat.completions.parse(asked);
    equal(answer.choices[0].message.parsed, { colour: "red" });
    const again = [...asked.messages, answer.choices[0].message, { role: "user", content: THANKS }];
    await client.chat.completions.create({ model: MODEL, messages: again });
  },
  async errors() {
    const create = (body, options) => () => client.chat.completions.create({ model: MODEL, ...body }, options);
    const missing = await rejects(create({ model: "another", messages: hello }));
    equal([missing instanceof OpenAI.NotFoundError, missing.code], [true, "model_not_found"]);
    const overflow = await rejects(create({ messages: [{ role: "user", content: TOO_LONG }] }));
    equal([overflow instanceof OpenAI.BadRequestError, overflow.code], [true, "context_length_exceeded"]);
    const stranger = await rejects(create({ messages: hello }, { headers: { Authorization: "Bearer wrong" } }));
    equal(stranger instanceof OpenAI.AuthenticationError, true);
  },
  async usage() {
    const whole = (await client.chat.completions.create({ model: MODEL, messages: hello })).usage;
    equal(whole.total_tokens, whole.prompt_tokens + whole.completion_tokens);
    const stream = client.chat.completions.stream({
      model: MODEL,
      messages: hello,
      stream_options: { include_usage: true },
    });
    equal((await stream.totalUsage()).total_tokens, whole.total_tokens);
  },
});
