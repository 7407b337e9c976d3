// Calls at a fixed rate, whether or not the earlier ones are answered (k6, an open model). Run by loadtest/gate/k6.py,
// which sets the variables and reads the points of the metric `call`: milliseconds, tagged with what came of it.
import http from "k6/http";
import exec from "k6/execution";
import { Trend } from "k6/metrics";

const call = new Trend("call", true);
const seconds = Number(__ENV.SECONDS);
const rate = Number(__ENV.RPM);

export const options = {
  discardResponseBodies: false,
  scenarios: {
    calls: {
      executor: "constant-arrival-rate",
      rate: rate,
      timeUnit: "1m",
      duration: `${seconds}s`,
      preAllocatedVUs: Math.max(10, Math.ceil(rate / 60)),
      maxVUs: Math.max(100, Math.ceil((rate / 60) * 15)),
      gracefulStop: "30s",
    },
  },
};

export default function () {
  const number = exec.scenario.iterationInTest;
  const streamed = (number % 100) / 100 < Number(__ENV.STREAM_SHARE);
  const body = {
    model: __ENV.MODEL,
    messages: [{ role: "user", content: `Call ${number} of a load test: where is my parcel? tokens=20` }],
    max_tokens: 60,
    stream: streamed,
  };
  const answer = http.post(`${__ENV.URL}/v1/chat/completions`, JSON.stringify(body), {
    headers: {
      Authorization: `Bearer ${__ENV.KEY}`,
      "Content-Type": "application/json",
      "X-Tenant-Id": __ENV.TENANT,
      "X-Request-Id": `${__ENV.RUN}.${number}`,
    },
    timeout: "30s",
  });
  call.add(answer.timings.duration, {
    outcome: outcome(answer, streamed),
    fallback: answer.headers["X-Gateway-Fallback"] === "true" ? "true" : "false",
  });
}

function outcome(answer, streamed) {
  if (answer.status !== 200) return answer.status ? `status ${answer.status}` : "no answer";
  if (streamed) return answer.body.endsWith("data: [DONE]\n\n") && !answer.body.includes('"error"') ? "ok" : "broken stream";
  return answer.json("choices.0.message.content") ? "ok" : "empty answer";
}
