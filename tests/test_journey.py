"""One call, end to end: through Traefik's TLS, a replica, the vendor, and into PostgreSQL."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from decimal import Decimal
from pathlib import Path

import httpx
import openai
import pytest

from tests.journey import EXPIRED_KEY, OVERLAY, Journey, chat, events, text, until


def test_sdk_gets_an_answer_over_verified_tls(journey: Journey) -> None:
    answer = journey.openai().chat.completions.create(**chat("tokens=7"))
    assert answer.usage.completion_tokens == 7
    assert answer.choices[0].message.content


def test_sdk_stream_says_what_the_unary_answer_says(journey: Journey) -> None:
    client = journey.openai()
    unary = client.chat.completions.create(**chat("tokens=30"))
    stream = client.chat.completions.create(**chat("tokens=30"), stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == unary.choices[0].message.content
    assert chunks[-1].usage == unary.usage


def test_usage_is_withheld_from_a_stream_that_did_not_ask_for_it(journey: Journey) -> None:
    with journey.stream(chat("tokens=5")) as response:
        chunks = events(response)
    assert all(chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1] == "[DONE]"
    assert journey.asked()[0]["body"]["stream_options"] == {"include_usage": True}


def test_answer_is_the_vendors_own_bytes(journey: Journey) -> None:
    answer = journey.post(chat("tokens=5"))
    direct = httpx.post(
        f"{journey.stack.simulator_url}/openai/v1/chat/completions",
        json=chat("tokens=5", model="gpt-4o-mini-2024-07-18"),
        headers={"authorization": "Bearer any"},
        timeout=60,
    )
    ids = re.compile(rb'"(id|created)": ("[^"]*"|\d+)')
    assert ids.sub(b"", answer.content) == ids.sub(b"", direct.content)


def test_members_that_we_do_not_know_reach_the_vendor_as_they_came(journey: Journey) -> None:
    body = b'{"messages":[{"role":"user","content":"h\\u00e9"}], "model":"support-fast", "x_new": {"a" : [1, 2.50] }}'
    assert journey.post(body).status_code == 200
    asked = journey.asked()[0]["body"]
    assert asked["x_new"] == {"a": [1, 2.50]}
    assert list(asked) == ["messages", "model", "x_new"]
    assert asked["model"] == "gpt-4o-mini-2024-07-18"


def test_row_of_a_call_holds_what_its_answer_said(journey: Journey) -> None:
    answer = journey.post(
        chat("tokens=11 cached=4"), x_feature_id="support-chat", x_prompt_version="v3.2", x_user_id="ann@example.com"
    )
    usage = answer.json()["usage"]
    event = journey.row(answer.headers["x-request-id"])
    assert event["status"] == "success"
    assert event["tenant_id"] == "tenant-a"
    assert event["feature_id"] == "support-chat"
    assert event["prompt_version"] == "v3.2"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", event["user_id_hash"])
    assert event["model_resolved"] == answer.json()["model"] == answer.headers["x-gateway-model-resolved"]
    assert event["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert event["usage"]["output_tokens"] == usage["completion_tokens"]
    assert event["usage"]["classes"]["cache_read"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert event["usage"]["total_tokens"] == int(answer.headers["x-usage-total-tokens"])
    assert event["usage_source"] == "vendor"
    assert event["cost_usd"]["total"] == float(answer.headers["x-gateway-cost-usd"])
    assert event["vendor_request_id"].startswith("req_")
    assert event["config_version"] == answer.headers["x-gateway-config-version"]
    assert event["finish_reason"] == "stop"
    assert [attempt["outcome"] for attempt in event["attempts"]] == ["success"]
    assert event["fallback_chain"] == ["openai/gpt-4o-mini", "openrouter/gpt-4o-mini"]
    assert event["fallback_used"] is False


def test_cost_is_exact_to_the_nano_dollar(journey: Journey) -> None:
    answer = journey.post(chat("tokens=13 cached=8"))
    usage = answer.json()["usage"]
    uncached = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    expected = (
        Decimal(uncached) * Decimal("0.15") + Decimal(8) * Decimal("0.075") + Decimal(13) * Decimal("0.60")
    ) / 1_000_000
    journey.row(answer.headers["x-request-id"])
    (row,) = journey.query("SELECT cost_usd FROM ledger WHERE request_id = %s", answer.headers["x-request-id"])
    assert row["cost_usd"] == expected.quantize(Decimal("1e-9"))


def test_stream_costs_what_the_unary_call_costs(journey: Journey) -> None:
    unary = journey.post(chat("tokens=21 cached=7"))
    with journey.stream(chat("tokens=21 cached=7")) as streamed:
        events(streamed)
    found = journey.rows([unary.headers["x-request-id"], streamed.headers["x-request-id"]])
    one, other = found.values()
    assert one["cost_usd"] == other["cost_usd"]
    assert one["usage"] == other["usage"]


def test_unknown_price_is_charged_at_the_ceiling(journey: Journey) -> None:
    answer = journey.post(chat("tokens=3", model="unpriced"))
    event = journey.row(answer.headers["x-request-id"])
    assert event["cost_status"] == "unpriced"
    assert event["cost_usd"]["output"] == 3 * 500 / 1_000_000


def test_every_outcome_with_a_valid_credential_is_one_row(journey: Journey, other_key: str) -> None:
    journey.fault("openai", kind="status", status=400, message="No.", model="gpt-4o-2024-11-20")
    outcomes = {
        "bad json": (journey.post(b"{"), 400, "invalid_request", "refused"),
        "no messages": (journey.post({"model": "support-fast"}), 400, "invalid_request", "refused"),
        "missing tenant": (journey.post(x_tenant_id=""), 401, "tenant_required", "refused"),
        "forged tenant": (journey.post(x_tenant_id="tenant-b"), 403, "tenant_not_allowed", "refused"),
        "no such tenant": (journey.post(x_tenant_id="nobody"), 403, "tenant_not_allowed", "refused"),
        "bad tenant name": (journey.post(x_tenant_id="a{b}"), 400, "invalid_request", "refused"),
        "no such model": (journey.post(chat(model="gpt-9")), 404, "model_not_found", "refused"),
        "model not allowed": (
            journey.post(chat(model="support-quality"), x_tenant_id="tenant-narrow"), 403, "model_not_allowed",
            "refused",
        ),
        "too large": (journey.post(b'{"a":"' + b"x" * 8_000_001), 413, "request_too_large", "refused"),
        "bad feature": (journey.post(x_feature_id="a b"), 400, "invalid_request", "refused"),
        "bad hint": (journey.post(x_est_tokens="many"), 400, "invalid_request", "refused"),
        "vendor says no": (journey.post(chat(model="gpt-4o")), 404, "model_not_found", "refused"),
        "over its budget": (
            journey.post(chat(max_tokens=5_000), x_tenant_id="tenant-poor"), 429, "budget_exceeded", "rate_limited",
        ),
        "success": (journey.post(), 200, None, "success"),
    }  # fmt: skip
    for name, (answer, status, code, _) in outcomes.items():
        assert answer.status_code == status, name
        assert (answer.json().get("error") or {}).get("code") == code, name
    found = journey.rows([answer.headers["x-request-id"] for answer, *_ in outcomes.values()])
    for name, (answer, _, code, ledger_status) in outcomes.items():
        event = found[answer.headers["x-request-id"]]
        assert event["status"] == ledger_status, name
        assert event["error_code"] == code, name


def test_row_under_a_forged_tenant_is_not_that_tenants(journey: Journey) -> None:
    answer = journey.post(x_tenant_id="tenant-b")
    event = journey.row(answer.headers["x-request-id"])
    assert event["tenant_id"] is None
    assert event["tenant_claimed"] == "tenant-b"


def test_calls_under_a_forged_tenant_take_nothing_from_it(journey: Journey, other_key: str) -> None:
    def remaining() -> int:
        answer = journey.post(authorization=f"Bearer {other_key}", x_tenant_id="tenant-b")
        return int(answer.headers["x-ratelimit-remaining-requests"])

    before = remaining()
    for _ in range(20):
        assert journey.post(x_tenant_id="tenant-b").status_code == 403
    assert remaining() == before - 1


@pytest.mark.parametrize(
    "authorization", ["", "Bearer sk-gw-unknown00000-" + "x" * 43, "Basic abc", "Bearer", f"Bearer {EXPIRED_KEY}"]
)
def test_without_a_valid_credential_there_is_no_row(journey: Journey, authorization: str) -> None:
    answer = journey.post(authorization=authorization)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    valid = journey.post()
    journey.row(valid.headers["x-request-id"])
    (count,) = journey.query("SELECT count(*) FROM ledger WHERE request_id = %s", answer.headers["x-request-id"])
    assert count["count"] == 0


def test_key_is_taken_from_x_api_key_too(journey: Journey) -> None:
    assert journey.post(authorization="", x_api_key=journey.key).status_code == 200


def test_connection_header_that_strips_the_credential_means_401(journey: Journey) -> None:
    answer = journey.post(connection="authorization")
    assert answer.status_code == 401


def test_models_lists_what_the_tenant_may_use(journey: Journey) -> None:
    listed = [model.id for model in journey.openai().models.list()]
    assert set(listed) == {"support-fast", "support-quality", "support-auto", "embed-small", *OVERLAY["aliases"]}
    narrow = journey.http.get("/v1/models", headers=journey.headers(x_tenant_id="tenant-narrow")).json()
    assert [model["id"] for model in narrow["data"]] == ["support-fast"]


def test_sdk_raises_the_error_that_the_code_names(journey: Journey) -> None:
    with pytest.raises(openai.PermissionDeniedError) as raised:
        journey.openai().chat.completions.create(**chat(), extra_headers={"X-Tenant-Id": "tenant-b"})
    assert raised.value.code == "tenant_not_allowed"
    assert raised.value.request_id


def test_unknown_route_and_method_answer_in_the_dialect(journey: Journey) -> None:
    missing = journey.http.get("/v1/nothing", headers=journey.headers())
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = journey.http.get("/v1/chat/completions", headers=journey.headers())
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/v1/messages", "its base URL ends without."),
        ("/chat/completions", "There is /v1/chat/completions: end the client's base URL with /v1."),
        ("/models", "There is /v1/models: end the client's base URL with /v1."),
        ("/v1/nothing", "There is no route /v1/nothing."),
    ],
)
def test_a_wrong_base_url_is_told_what_to_mend_through_traefik(journey: Journey, path: str, says: str) -> None:
    answer = journey.http.get(path, headers=journey.headers())
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert answer.json()["error"]["message"].endswith(says)


def test_an_empty_body_is_called_empty(journey: Journey) -> None:
    answer = journey.post(b"")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "The body is empty: send a JSON object.")


def test_sixth_request_of_a_tenant_with_five_a_minute_is_told_when_to_come_back(journey: Journey) -> None:
    began = time.monotonic()
    answers = [journey.post(x_tenant_id="tenant-few") for _ in range(6)]
    took = time.monotonic() - began
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "5"
    assert [answer.headers.get("x-ratelimit-remaining-requests") for answer in answers[:5]] == list("43210")
    error = answers[5].json()["error"]
    assert (error["code"], error["limit"]) == ("rate_limit_exceeded", "tenant_rpm")
    assert 59 - took <= int(answers[5].headers["retry-after"]) <= 62
    assert journey.row(answers[5].headers["x-request-id"])["limit_tripped"] == "tenant_rpm"


def test_budget_block_tells_the_sdk_not_to_retry(journey: Journey) -> None:
    answer = journey.post(chat(max_tokens=100_000), x_tenant_id="tenant-poor")
    assert answer.status_code == 429
    assert answer.json()["error"]["limit"] == "tenant_daily_tokens"
    assert answer.headers["x-should-retry"] == "false"
    assert int(answer.headers["retry-after"]) >= 1


def test_hint_raises_a_reservation_and_never_lowers_it(journey: Journey) -> None:
    refused = journey.post(chat(max_tokens=1), x_tenant_id="tenant-poor", x_est_tokens="50000")
    assert refused.json()["error"]["code"] == "budget_exceeded"
    low = journey.post(chat(max_tokens=50_000), x_tenant_id="tenant-poor", x_est_tokens="1")
    assert low.json()["error"]["code"] == "budget_exceeded"


def test_vendor_sees_only_the_headers_that_we_wrote(journey: Journey) -> None:
    journey.post(cookie="planted=1", x_secret="planted", openai_organization="planted", x_forwarded_host="planted")
    headers = journey.asked()[0]["headers"]
    assert set(headers) == {"host", "authorization", "content-type", "accept", "accept-encoding", "content-length"}
    assert "planted" not in str(headers)
    assert journey.key not in str(headers)


def test_vendors_own_headers_stay_with_the_vendor(journey: Journey) -> None:
    headers = journey.post().headers
    assert not {"set-cookie", "openai-organization", "cf-ray", "alt-svc"} & set(headers)


def test_body_larger_than_the_limit_is_refused_while_it_is_read(journey: Journey) -> None:
    def endless() -> object:
        for _ in range(200):
            yield b"x" * 65_536

    answer = journey.http.post("/v1/chat/completions", content=endless(), headers=journey.headers())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_large_body_passes(journey: Journey) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 7_000_000}}
    body = chat() | {"messages": [{"role": "user", "content": [{"type": "text", "text": "tokens=3"}, image]}]}
    assert journey.post(body).status_code == 200


def test_first_event_of_a_stream_comes_before_the_last_is_made(journey: Journey) -> None:
    journey.fault(kind="hold")
    with journey.stream(chat("tokens=9")) as response:
        lines = response.iter_lines()
        next(lines)
        assert journey.counts()["completed"] == 0
        journey.release()
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_concurrent_calls_each_have_their_own_row(journey: Journey) -> None:
    answers: list[httpx.Response] = []

    def work() -> None:
        for _ in range(10):
            answers.append(journey.post(chat("tokens=3")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert len(journey.rows([answer.headers["x-request-id"] for answer in answers])) == 80


def test_answers_come_from_both_replicas(journey: Journey) -> None:
    def served(replica: int) -> float:
        scrape = journey.admin("/metrics", replica).text
        return sum(
            float(line.rpartition(" ")[2]) for line in scrape.splitlines() if line.startswith("gateway_requests_total")
        )

    before = [served(0), served(1)]
    for _ in range(30):
        journey.post(chat("tokens=2"))
    until(lambda: served(0) > before[0] and served(1) > before[1])


def test_smoke_script_passes_as_it_stands(journey: Journey, root: Path) -> None:
    environ = {
        "PATH": "/usr/bin:/bin",
        "LLM_GATEWAY_URL": journey.stack.url,
        "HELLO_SHIP_GATEWAY_KEY": journey.stack.key,
        "CURL_CA_BUNDLE": str(journey.stack.ca_file),
    }
    ran = subprocess.run(
        ["bash", root / "loadtest" / "gateway_smoke.sh"], env=environ, capture_output=True, text=True, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("gateway_smoke ok\n")


def test_assembled_stream_has_the_text_of_its_chunks(journey: Journey) -> None:
    with journey.stream(chat("tokens=9")) as response:
        assert text(events(response))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "x-usage-total-tokens" not in response.headers
