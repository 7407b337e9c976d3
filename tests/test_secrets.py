"""Canary secrets: planted wherever a secret can come in, looked for wherever one could leak out."""

from __future__ import annotations

import json

import msgspec
import pytest
import redis

from tests.journey import VENDOR_KEY, Journey, chat, events, token, until

USER = "canary-user@example.com"
PROMPT = "canary-prompt"
HEADER = "canary-header"


def _everything_written(journey: Journey) -> dict[str, bytes]:
    """All that the stack keeps or shows, by place."""
    stack = journey.stack
    places = {
        str(file.relative_to(stack.state_dir)): file.read_bytes()
        for folder in ("log", "spool")
        for file in (stack.state_dir / folder).glob("*")
        if file.name != "simulator.log"
    }
    rows = journey.query("SELECT to_jsonb(ledger) AS row FROM ledger")
    places["ledger"] = msgspec.json.encode([row["row"] for row in rows])
    with redis.Redis.from_url(stack.redis_url) as client:
        dump = []
        for key in client.scan_iter():
            dump.append(key)
            dump.append(client.dump(key) or b"")
        places["redis"] = b"\n".join(dump)
    for number in range(len(stack.replicas)):
        places[f"metrics of replica {number}"] = journey.admin("/metrics", number).content
        places[f"status of replica {number}"] = journey.admin("/status", number).content
    return places


def test_no_secret_is_found_in_logs_metrics_errors_ledger_or_redis(journey: Journey) -> None:
    planted = {"x_user_id": USER, "x_canary": HEADER, "cookie": f"session={HEADER}"}
    sent_token, expired = token(client_id="canary-service"), token(exp=1)
    edge_secret, user_salt = _kept_by_the_stack(journey, "edge_secret", "user_salt")
    answers = [
        journey.post(chat(PROMPT), authorization=f"Bearer {sent_token}", x_tenant_id="", **planted),
        journey.post(chat(PROMPT), authorization=f"Bearer {expired}", **planted),
        journey.post(chat(PROMPT), authorization=f"Basic {HEADER}", **planted),
        journey.post(chat(PROMPT), authorization="", x_api_key=HEADER, **planted),
        journey.post(chat(PROMPT), x_api_key=HEADER, x_gateway_edge=HEADER, **planted),
        journey.post(chat(PROMPT), x_forwarded_tls_client_cert_info=HEADER, proxy_authorization=HEADER, **planted),
        journey.post(chat(PROMPT), **planted),
        journey.post(chat(PROMPT, model="no-such"), **planted),
        journey.post(b'{"' + PROMPT.encode(), **planted),
        journey.post(chat(PROMPT), path=f"/v1/chat/completions?key={HEADER}", **planted),
        journey.post(chat(PROMPT), authorization=f"Bearer {HEADER}"),
    ]
    for fault in ({"kind": "status", "status": 401}, {"kind": "reset"}, {"kind": "status", "status": 400}):
        journey.fault("openai", **fault)
        answers.append(journey.post(chat(PROMPT), **planted))
    journey.fault("openai", kind="cut")
    with journey.stream(chat(PROMPT), **planted) as stream:
        events(stream)
    ids = [a.headers["x-request-id"] for a in answers if a.status_code != 401] + [stream.headers["x-request-id"]]
    journey.rows(ids)
    signatures = [text.rpartition(".")[2] for text in (sent_token, expired)]
    secrets = [VENDOR_KEY, journey.key, journey.stack.admin_token, USER, HEADER, PROMPT, *signatures]
    secrets += [edge_secret, user_salt, journey.stack.key]
    for place, content in _everything_written(journey).items():
        for secret in secrets:
            assert secret.encode() not in content, f"{secret} in {place}"
    for answer in answers:
        said = answer.text + "".join(answer.headers.values())
        assert not any(secret in said for secret in secrets if secret != PROMPT)  # the simulator may say it again


def _kept_by_the_stack(journey: Journey, *names: str) -> list[str]:
    kept = json.loads((journey.stack.state_dir / "secrets.json").read_text())
    return [kept[name] for name in names]


PLACES = [
    "authorization", "x-api-key", "cookie", "x-tenant-id", "x-feature-id", "x-user-id", "x-user-id-hash",
    "x-prompt-version", "x-request-id", "traceparent", "x-est-tokens", "idempotency-key", "cache-control", "user-agent",
    "referer", "x-forwarded-for", "x-forwarded-host", "forwarded", "proxy-authorization", "x-gateway-edge",
    "x-forwarded-tls-client-cert-info", "openai-organization", "tracestate", "baggage", "accept-language",
]  # fmt: skip
"""Headers that hold a credential, or into which somebody may paste one."""
CLAIMS = {"x-tenant-id", "x-feature-id", "x-user-id-hash", "x-prompt-version", "x-request-id", "user-agent"}
"""Those whose values are kept for the ledger: what is pasted there is in its rows, and in Traefik's access log."""


def test_credential_in_any_header_reaches_no_vendor(journey: Journey) -> None:
    for place in PLACES:
        journey.post(chat("tokens=2"), **{place.replace("-", "_"): f"sk-{HEADER}"})
    asked = journey.asked()
    assert len(asked) > len(PLACES) / 2
    assert HEADER not in json.dumps(asked)


@pytest.mark.parametrize("place", [place for place in PLACES if place not in CLAIMS])
def test_credential_pasted_into_the_wrong_header_is_kept_nowhere(journey: Journey, place: str) -> None:
    secret = f"sk-pasted-into-{place}"
    journey.post(chat("tokens=2"), **{place.replace("-", "_"): secret})
    journey.row(journey.post(chat("tokens=2")).headers["x-request-id"])
    for where, content in _everything_written(journey).items():
        assert secret.encode() not in content, where


def test_vendor_gets_the_key_and_nobody_elses(journey: Journey) -> None:
    journey.post(chat())
    assert journey.asked()[0]["headers"]["authorization"] == f"Bearer {VENDOR_KEY}"


def test_rotated_vendor_key_is_used_without_a_restart(journey: Journey) -> None:
    secret = journey.stack.state_dir / "vendor-key"

    def used() -> set[str]:
        """By each of the replicas."""
        answers = journey.each(chat("tokens=2"))
        assert {answer.status_code for answer in answers} == {200}
        return {request["headers"]["authorization"] for request in journey.asked()[-len(answers) :]}

    secret.write_text("canary-vendor-key-2\n")
    try:
        until(lambda: used() == {"Bearer canary-vendor-key-2"})
    finally:
        secret.write_text(VENDOR_KEY + "\n")
    until(lambda: used() == {f"Bearer {VENDOR_KEY}"})


def test_no_request_field_changes_where_we_connect(journey: Journey) -> None:
    body = chat() | {
        "api_base": "http://127.0.0.1:9/",
        "base_url": "http://127.0.0.1:9/",
        "api_key": "canary",
        "provider": "openrouter",
    }
    answer = journey.post(body, host="evil.example", x_forwarded_host="evil.example")
    assert answer.status_code == 200
    assert len(journey.asked("openai")) == 1
    assert journey.asked()[0]["headers"]["host"].startswith("127.0.0.1:")
