// Drives a server with the official Node SDK: argv is the base URL, the key and the model. Prints one JSON object.
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "Weather?" }];
const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object" } } }];

const whole = await client.chat.completions.create({ model, messages, tools });
const runner = client.chat.completions.stream({ model, messages, tools, stream_options: { include_usage: true } });
const streamed = await runner.finalChatCompletion();
const embedding = await client.embeddings.create({ model, input: ["one", "two"] });
const shaped = await client.chat.completions.create({
  model,
  messages,
  response_format: { type: "json_schema", json_schema: { name: "any", schema: { type: "object" }, strict: true } },
});
const models = await client.models.list();
let refused = null;
try {
  await client.chat.completions.create({ model, messages, temperature: 3 });
} catch (error) {
  refused = { name: error.constructor.name, param: error.param };
}
let missing = null;
try {
  await client.chat.completions.create({ model: "nope", messages });
} catch (error) {
  missing = { name: error.constructor.name, code: error.code };
}

const told = (completion) => {
  const { message, finish_reason } = completion.choices[0];
  const calls = (message.tool_calls ?? []).map((call) => [call.function.name, call.function.arguments]);
  return { content: message.content, calls, finish_reason };
};
console.log(
  JSON.stringify({
    whole: told(whole),
    streamed: told(streamed),
    usage: streamed.usage.completion_tokens === whole.usage.completion_tokens,
    embeddings: embedding.data.map((item) => item.embedding.length),
    shaped: shaped.choices[0].finish_reason,
    models: models.data.map((one) => one.id),
    refused,
    missing,
  }),
);
