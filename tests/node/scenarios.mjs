// What apps on Node do with the gateway, by OpenAI's own SDK. Prints one JSON document: what each scenario saw, by alias.
import OpenAI from "openai";
import { ContentFilterFinishReasonError } from "openai/core/error";

const { GATEWAY_URL, GATEWAY_KEY, GATEWAY_TENANT, GATEWAY_FEW, ALIASES, SOME } = process.env;
const settings = { baseURL: `${GATEWAY_URL}/v1`, apiKey: GATEWAY_KEY, maxRetries: 0 };
const client = new OpenAI({ ...settings, defaultHeaders: { "X-Tenant-Id": GATEWAY_TENANT } });
const few = new OpenAI({ ...settings, defaultHeaders: { "X-Tenant-Id": GATEWAY_FEW } });

const parameters = { type: "object", properties: { id: { type: "string" } }, required: ["id"] };
const tool = { type: "function", function: { name: "order_status", parameters } };
const flatTool = { type: "function", name: "order_status", parameters, strict: false };
const format = {
  name: "order",
  strict: true,
  schema: {
    type: "object", properties: { state: { type: "string" } }, required: ["state"], additionalProperties: false,
  },
};
const ask = (content) => [{ role: "user", content }];
const calls = (list) => list.map((call) => [call.function.name, JSON.parse(call.function.arguments)]);
const items = (output) =>
  output.map((item) =>
    item.type === "function_call"
      ? [item.name, JSON.parse(item.arguments)]
      : [item.type, ...(item.content ?? []), ...(item.summary ?? [])].map((part) => part.refusal ?? part.text ?? part),
  );

const pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const url = `data:image/png;base64,${pixel}`;

// What a chat completion says, without what each has anew.
const thoughtIn = (said) => said?.reasoning_content ?? said?.reasoning ?? "";
const told = (answer, thought) => [
  answer.choices.toSorted((one, other) => one.index - other.index).map(({ message, finish_reason, logprobs }) => ({
    said: message.content || null,
    refusal: message.refusal || null,
    thought: thought ?? thoughtIn(message),
    calls: calls(message.tool_calls ?? []),
    finish_reason,
    tokens: logprobs?.content?.map((one) => [one.token, one.logprob]) ?? null,
  })),
  answer.usage.total_tokens,
];

// Both answers to a request for chat. The SDK adds up the stream.
const chat = (content, members = {}) => async (model) => {
  const asked = { model, messages: ask(content), ...members };
  const whole = await client.chat.completions.create(asked);
  const runner = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
  // Of members that OpenAI has not, the SDK keeps the last piece alone.
  let thought = "";
  runner.on("chunk", (chunk) => (thought += thoughtIn(chunk.choices[0]?.delta)));
  // It throws where a filter has ended the answer, as at OpenAI; what it has added up by then is there.
  await runner.done().catch((error) => {
    if (!(error instanceof ContentFilterFinishReasonError)) throw error;
  });
  const streamed = runner.currentChatCompletionSnapshot ?? (await runner.finalChatCompletion());
  return { whole: told(whole), streamed: told(streamed, thought) };
};

// Both answers to a request for a response, and whether the events are numbered from 0 on.
const responses = (input, members = {}) => async (model) => {
  const asked = { model, input, ...members };
  const whole = await client.responses.create(asked);
  const numbers = [];
  let last;
  for await (const event of client.responses.stream(asked)) {
    numbers.push(event.sequence_number);
    last = event.response ?? last;
  }
  // What finalResponse() gives has no output_text, whoever answers.
  const told = (answer) => [items(answer.output), answer.status, answer.incomplete_details, answer.usage.total_tokens];
  return { whole: told(whole), streamed: told(last), numbered: numbers.every((number, place) => number === place) };
};

const scenarios = {
  chat: chat("tokens=9"),
  tools: chat("tools=2", { tools: [tool] }),
  beside: chat("tools=2 beside=4", { tools: [tool] }),
  noTools: chat("tokens=5", { tools: [] }),
  refusal: chat("refusal=6"),
  reasoning: chat("reasoning=3 tokens=4", { reasoning_effort: "low" }),
  image: chat([{ type: "text", text: "tokens=3" }, { type: "image_url", image_url: { url } }]),
  json: chat("Which?", { response_format: { type: "json_schema", json_schema: format } }),
  responseJson: responses("Which?", { text: { format: { type: "json_schema", ...format } } }),
  responseNoTools: responses("tokens=5", { tools: [] }),
  responses: responses("tokens=9", { instructions: "Be brief." }),
  responseTools: responses("tools=2", { tools: [flatTool] }),
  responseBeside: responses("tools=2 beside=4", { tools: [flatTool] }),
  responseRefusal: responses("refusal=6"),
  responseReasoning: responses("reasoning=3 tokens=4", { reasoning: { effort: "low" } }),
  responseImage: responses([
    { role: "user", content: [{ type: "input_text", text: "tokens=3" }, { type: "input_image", image_url: url }] },
  ]),
  async schema(model) {
    const asked = { model, messages: ask("Which?"), response_format: { type: "json_schema", json_schema: format } };
    const parsed = await client.chat.completions.parse(asked);
    return typeof parsed.choices[0].message.parsed.state;
  },
  async left(model) {
    const { data, response } = await client.chat.completions
      .create({ model, messages: ask("tokens=400 chunk_ms=20"), stream: true })
      .withResponse();
    for await (const chunk of data) if (chunk.choices[0]?.delta?.content) break;
    return response.headers.get("x-request-id");
  },
  async responseLeft(model) {
    const { data, response } = await client.responses
      .create({ model, input: "tokens=400 chunk_ms=20", stream: true })
      .withResponse();
    for await (const event of data) if (event.type === "response.output_text.delta") break;
    return response.headers.get("x-request-id");
  },
};

// What not every vendor has.
const some = {
  several: chat("tokens=5", { n: 3 }),
  logprobs: chat("tokens=4", { logprobs: true, top_logprobs: 2 }),
  responseLogprobs: responses("tokens=4", { include: ["message.output_text.logprobs"] }),
};

const seen = { models: (await client.models.list()).data.map((model) => model.id) };
seen.embedding = (await client.embeddings.create({ model: "embed-small", input: "a b" })).data[0].embedding.length;
for (const [name, scenario] of Object.entries(scenarios)) {
  seen[name] = {};
  for (const alias of ALIASES.split(",")) seen[name][alias] = await scenario(alias);
}
for (const [name, scenario] of Object.entries(some)) {
  seen[name] = {};
  for (const alias of SOME.split(",")) seen[name][alias] = await scenario(alias);
}
seen.throttled = [];
for (const once of [
  () => few.chat.completions.create({ model: "one-target", messages: ask("Hi") }),
  () => few.responses.create({ model: "claude", input: "Hi" }),
]) {
  try {
    for (let call = 0; call < 7; call++) await once();
  } catch (error) {
    seen.throttled.push([error.constructor.name, error.status, error.code, Number(error.headers.get("retry-after")) >= 1]);
  }
}
console.log(JSON.stringify(seen));
