// What apps on Node do with the gateway, by OpenAI's own SDK. Prints one JSON document: what each scenario saw, by alias.
import OpenAI from "openai";

const { GATEWAY_URL, GATEWAY_KEY, GATEWAY_TENANT, GATEWAY_FEW, ALIASES } = process.env;
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
    item.type === "function_call" ? [item.name, JSON.parse(item.arguments)] : [item.type, item.content?.[0]?.text],
  );

const scenarios = {
  async chat(model) {
    const asked = { model, messages: ask("tokens=9") };
    const whole = await client.chat.completions.create(asked);
    const streamed = await client.chat.completions
      .stream({ ...asked, stream_options: { include_usage: true } })
      .finalChatCompletion();
    const told = (answer) => [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.total_tokens];
    return { whole: told(whole), streamed: told(streamed) };
  },
  async tools(model) {
    const asked = { model, messages: ask("tools=2"), tools: [tool] };
    const whole = await client.chat.completions.create(asked);
    const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
    return { whole: calls(whole.choices[0].message.tool_calls), streamed: calls(streamed.choices[0].message.tool_calls) };
  },
  async schema(model) {
    const asked = { model, messages: ask("Which?"), response_format: { type: "json_schema", json_schema: format } };
    const parsed = await client.chat.completions.parse(asked);
    return typeof parsed.choices[0].message.parsed.state;
  },
  async responses(model) {
    const asked = { model, input: "tokens=9", instructions: "Be brief." };
    const whole = await client.responses.create(asked);
    const numbers = [];
    const stream = client.responses.stream(asked).on("event", (event) => numbers.push(event.sequence_number));
    const streamed = await stream.finalResponse();
    // finalResponse() has no output_text, whoever answers.
    const told = (answer) => [items(answer.output), answer.status, answer.usage.total_tokens];
    return { whole: told(whole), streamed: told(streamed), numbered: numbers.every((number, place) => number === place) };
  },
  async responseTools(model) {
    const asked = { model, input: "tools=2", tools: [flatTool] };
    const whole = await client.responses.create(asked);
    const streamed = await client.responses.stream(asked).finalResponse();
    return { whole: items(whole.output), streamed: items(streamed.output) };
  },
  async left(model) {
    const { data, response } = await client.chat.completions
      .create({ model, messages: ask("tokens=400 chunk_ms=20"), stream: true })
      .withResponse();
    for await (const chunk of data) if (chunk.choices[0]?.delta?.content) break;
    return response.headers.get("x-request-id");
  },
};

const seen = { models: (await client.models.list()).data.map((model) => model.id) };
seen.embedding = (await client.embeddings.create({ model: "embed-small", input: "a b" })).data[0].embedding.length;
for (const [name, scenario] of Object.entries(scenarios)) {
  seen[name] = {};
  for (const alias of ALIASES.split(",")) seen[name][alias] = await scenario(alias);
}
try {
  for (let call = 0; call < 7; call++) await few.chat.completions.create({ model: "one-target", messages: ask("Hi") });
} catch (error) {
  seen.throttled = [error.constructor.name, error.status, error.code, Number(error.headers.get("retry-after")) >= 1];
}
console.log(JSON.stringify(seen));
