"""What the end-to-end tests share: calls through Traefik, the rows they left, the vendor's moods."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jwt
import openai
import psycopg
from cryptography.hazmat.primitives.asymmetric import ec
from psycopg.rows import dict_row

from app.ambient import Ambient
from app.control import tell
from app.cooldowns import COOLDOWN
from loadtest import services
from loadtest.stack import Stack
from tests.ledger_parts import conforming

DEADLINE_SECONDS = 60.0
"""Of what must come true: how soon it does is for the machine to say."""
OTHER_KEY = "sk-gw-otherkey0001-" + "o" * 43
VIEWER_KEY = "sk-gw-viewerkey001-" + "v" * 43
LIMITED_KEY = "sk-gw-limitedkey01-" + "l" * 43
EXPIRED_KEY = "sk-gw-expired00001-" + "e" * 43
SIMULATED = {"provider": "openai", "model": "gpt-4o-mini-2024-07-18"}


def _digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


POOLS: dict[str, dict[str, dict[str, Any]]] = {
    "pooled": {"one": {}, "two": {}},
    "half-bad": {"bad-one": {"weight": 1000}, "good": {}},
    "granted": {"small": {"weight": 1000, "rpm": 2}, "large": {}},
    "full": {"small": {"rpm": 1}},
}
"""Providers with pools of keys, at the simulator; each key is its own name and `-key`."""


def pool_providers(folder: Path, simulator_url: str) -> dict[str, Any]:
    """What OVERLAY's targets of pools need in `providers`; writes the keys' files into `folder`."""
    for key in {key for pool in POOLS.values() for key in pool}:
        (folder / f"{key}-key").write_text(f"{key}-key\n")
    return {
        name: {
            "kind": "openai_compatible",
            "base_url": f"{simulator_url}/{name}/v1",
            "keys": {key: facts | {"api_key": f"file:{folder / key}-key"} for key, facts in pool.items()},
        }
        for name, pool in POOLS.items()
    }


PASSED = {
    "gpt-3.5-turbo-instruct": "completions",
    "omni-moderation-latest": "moderations",
    "tts-1": "speech",
    "whisper-1": "transcriptions",
    "gpt-4o-mini-transcribe": "transcriptions",
    "dall-e-3": "images",
    "gpt-image-1": "images",
}
"""Models of what OpenAI has beside chat and embeddings: each an alias of its own."""
_FILES = ("chat", "messages", "metrics", "node", "passed", "prometheus", "responses")
FEW = ("tenant-few", *(f"tenant-few-{file}" for file in _FILES))
"""Tenants of few requests in 60 s: one for each file that uses them up, as files of a worker share its stack."""
OVERLAY: dict[str, Any] = {
    "guardrails": {"suite": {"url": "http://127.0.0.1:9/nobody"}},
    "prices": {
        "openai": {
            name: {"source": "the suite", "checked_on": "2026-11-01", **prices}
            for name, prices in {
                "gpt-3.5-turbo-instruct": {"input": 1.5, "output": 2},
                "omni-moderation-latest": {"input": 0},
                "tts-1": {"input": 0, "characters": 15},
                "whisper-1": {"input": 0, "seconds": 100},
                "gpt-4o-mini-transcribe": {"input": 1.25, "audio_input": 1.25, "output": 5},
                "gpt-image-1": {"input": 5, "image_input": 10, "output": 40},
            }.items()
        },
    },
    "gateway": {
        "trace_sample_ratio": 1,
        "max_body_bytes": 8_000_000,
        "retry": {
            "backoff_base_seconds": 0.02, "backoff_cap_seconds": 1, "budget_percent": 100,
            "cooldown_seconds": 60,  # `clear` ends each
        },
        "breaker": {"failures": 1000},
        "redis": {"timeout_ms": 5_000},  # on a busy machine it is slow, not away
        "overload": {"max_delay_ms": 60_000},  # and a replica late, not overloaded
        "drain": {"delay_seconds": 5, "limit_seconds": 60},  # two of them for a machine that stands still
    },
    "targets": {
        "gemini/gemini-3-pro": {"provider": "gemini", "model": "gemini-3-pro"},
        **{f"{name}/gpt-4o-mini": SIMULATED | {"provider": name} for name in POOLS},
        **{
            f"openai/{model}": {"provider": "openai", "model": model, "serves": serves}
            for model, serves in PASSED.items()
        },
        "azure/whisper-1": {"provider": "azure", "model": "whisper-1", "serves": "transcriptions"},
        "openai/unpriced": {"provider": "openai", "model": "gpt-4.1-nano"},
        "openrouter/text-embedding-3-small": {
            "provider": "openrouter", "model": "openai/text-embedding-3-small", "serves": "embeddings",
        },
    },
    "aliases": {
        "guarded": {"targets": ["openai/gpt-4o-mini"], "guardrails": ["suite"]},
        "pooled": {"targets": ["pooled/gpt-4o-mini"]},
        "half-bad": {"targets": ["half-bad/gpt-4o-mini"]},
        "granted": {"targets": ["granted/gpt-4o-mini"]},
        "full": {"targets": ["full/gpt-4o-mini", "openai/gpt-4o-mini"]},
        **{model: {"targets": [f"openai/{model}"]} for model in PASSED},
        "whisper-chain": {"targets": ["azure/whisper-1", "openai/whisper-1"]},
        "one-target": {"targets": ["openai/gpt-4o-mini"]},
        "remembered": {"targets": ["openai/gpt-4o-mini"], "cache": {"mode": "exact", "max_temperature": 1}},
        "meant": {
            "targets": ["openai/gpt-4o-mini"],
            "cache": {
                "mode": "static", "threshold": 0.8, "max_temperature": 1, "reverify_percent": 100,
                "embedder": "embed-small", "embedder_timeout_ms": 10_000, "judge": "judging", "judge_percent": 100,
            },
        },
        "meant-hasty": {
            "targets": ["openai/gpt-4o-mini"],
            "cache": {
                "mode": "static", "threshold": 0.8, "max_temperature": 1, "reverify_percent": 0,
                "embedder": "embed-small", "embedder_timeout_ms": 50,
            },
        },
        "meant-plainly": {
            "targets": ["openai/gpt-4o-mini"],
            "cache": {
                "mode": "static", "threshold": 0.8, "max_temperature": 1, "reverify_percent": 0,
                "embedder_timeout_ms": 10_000,
            },
        },
        "judging": {"targets": ["openrouter/gpt-4o-mini"]},
        "quick": {
            "targets": ["openai/gpt-4o-mini", "openrouter/gpt-4o-mini"],
            # What hangs is waited for so long, by a machine that may stand still for two seconds.
            "timeouts": {"first_token_seconds": 2.5, "answer_seconds": 2.5, "idle_seconds": 2.5, "total_seconds": 30},
        },
        "ruled": {
            "targets": ["openai/gpt-4o-mini", "openrouter/gpt-4o-mini"],
            "rules": {
                "long": {"when": {"prompt_tokens_above": 500}, "targets": ["openrouter/gpt-4o"]},
                "beta": {
                    "when": {"plans": ["internal"], "headers": {"x-feature-id": ["beta"]}},
                    "targets": ["openrouter/gpt-4o-mini", "openai/gpt-4o-mini"],
                },
            },
        },
        "cascaded": {
            "targets": ["openai/gpt-4o-mini"], "cascade": {"targets": ["openrouter/gpt-4o"], "mean_logprob_below": -9},
        },
        "shadowed": {
            "targets": ["openai/gpt-4o-mini"], "shadow": {"target": "openrouter/gpt-4o-mini", "percent": 100},
        },
        "hedged": {
            "targets": ["openai/gpt-4o-mini", "openrouter/gpt-4o-mini"],
            "hedge": {"after_seconds": 0.2, "percent": 100},
        },
        "hasty": {"targets": ["openai/gpt-4o-mini"], "timeouts": {"total_seconds": 0.6}},
        "unpriced": {"targets": ["openai/unpriced"]},
        "azure": {"targets": ["azure/gpt-4o-mini"]},
        "azure-first": {"targets": ["azure/gpt-4o-mini", "openai/gpt-4o-mini"]},
        "embed-azure": {"targets": ["azure/text-embedding-3-small"]},
        "claude": {"targets": ["anthropic/claude-haiku-4-5"]},
        "openai-then-claude": {"targets": ["openai/gpt-4o-mini", "anthropic/claude-haiku-4-5"]},
        "claude-first": {"targets": ["anthropic/claude-haiku-4-5", "openai/gpt-4o-mini"]},
        "gemini": {"targets": ["gemini/gemini-2.5-flash"]},
        "gemini-first": {"targets": ["gemini/gemini-2.5-flash", "openai/gpt-4o-mini"]},
        "gemini-later": {"targets": ["gemini/gemini-3-pro"]},
        "embed-gemini": {"targets": ["gemini/gemini-embedding-001"]},
        "vertex": {"targets": ["vertex/gemini-2.5-flash"]},
        "embed-vertex": {"targets": ["vertex/gemini-embedding-001"]},
        "groq": {"targets": ["groq/gpt-oss-120b"]},
        "mistral": {"targets": ["mistral/mistral-small"]},
        "mistral-first": {"targets": ["mistral/mistral-small", "openai/gpt-4o-mini"]},
        "claude-at-aws": {"targets": ["bedrock/claude-sonnet-4-5"]},
        "aws-first": {"targets": ["bedrock/nova-lite", "openai/gpt-4o-mini"]},
        "titan": {"targets": ["bedrock/titan-embed-v2"]},
        "embed-chain": {"targets": ["openai/text-embedding-3-small", "openrouter/text-embedding-3-small"]},
    },
    "tenants": {
        "tenant-a": {"plan": "internal", "rpm": 100_000, "daily_token_cap": 1_000_000_000},
        "tenant-b": {"plan": "internal", "rpm": 100_000, "daily_token_cap": 1_000_000_000},
        **{name: {"plan": "internal", "rpm": 5} for name in FEW},
        "tenant-poor": {"plan": "internal", "daily_token_cap": 3_000},
        "tenant-narrow": {"plan": "free"},
        "tenant-low": {"plan": "internal", "daily_token_cap": 4_000, "downgrade": {"azure": "one-target"}},
        "tenant-lower": {"plan": "internal", "daily_token_cap": 4_000, "downgrade": {"azure": "one-target"}},
        "usage-a": {"plan": "internal", "daily_token_cap": 10_000},
        "usage-b": {"plan": "internal"},
        "limit-tpm": {"plan": "internal", "tpm": 4_000},
        "limit-concurrency": {"plan": "internal", "concurrency": 1},
        "limit-day": {"plan": "internal", "daily_usd": "0.000001", "budget_time_zone": "Asia/Tokyo"},
        "limit-month": {"plan": "internal", "monthly_usd": "0.000001"},
        "limit-key": {"plan": "internal"},
        "spender": {"plan": "internal", "tpm": 10_000_000, "concurrency": 50, "daily_usd": 1000, "monthly_usd": 9000},
    },
    "issuers": {
        "sso": {
            "issuer": "https://login.example.com/", "audience": "llm-gateway", "algorithms": ["ES256"],
            "jwks": "file:/to/be/set", "tenants": ["token-*", "tenant-b"],
        },
    },
    "service_keys": {
        "otherkey0001": {"digest": _digest(OTHER_KEY), "service": "other", "tenants": ["tenant-b"]},
        "viewerkey001": {
            "digest": _digest(VIEWER_KEY), "service": "viewer", "tenants": ["usage-a"], "roles": ["usage"],
        },
        "expired00001": {
            "digest": _digest(EXPIRED_KEY), "service": "old", "tenants": ["*"], "expires": "2020-01-01",
        },
        "limitedkey01": {
            "digest": _digest(LIMITED_KEY), "service": "limited", "tenants": ["limit-key"], "limits": {"rpm": 2},
        },
        "suitekey0001": {
            "digest": _digest("sk-gw-suitekey0001-" + "s" * 43),
            "service": "suite",
            "roles": ["call", "usage"],
            "tenants": [
                *FEW,
                *("tenant-a", "tenant-poor", "tenant-narrow", "tenant-low", "tenant-lower", "spender"),
                *("limit-tpm", "limit-concurrency", "limit-day", "limit-month"),
            ],
        },
    },
}  # fmt: skip


def patient_edge(folder: Path) -> Path:
    """Traefik's dynamic files, in which a replica that a busy machine holds up is not taken for dead within 0.8 s."""
    made = Path(shutil.copytree(services.TRAEFIK / "dynamic", folder / "dynamic"))
    file = made / "llm-gateway.yml"
    shipped = file.read_text()
    patient = shipped.replace("timeout: 800ms", "timeout: 20s")
    assert patient != shipped
    file.write_text(patient)
    return made


def sees_all(stack: Stack) -> bool:
    """Whether Traefik sends calls to every replica: it looks once a second, and both may have been away."""
    told = httpx.get(stack.traefik_metrics_url, timeout=60).text
    up = re.findall(r'^traefik_service_server_up\{.*url="([^"]+)"\} 1$', told, re.MULTILINE)
    return {replica.url for replica in stack.replicas} <= set(up)


VENDOR_KEY = "canary-vendor-key"
TOKEN_KEY = ec.generate_private_key(ec.SECP256R1())


def token(**claims: Any) -> str:
    """A token of the suite's issuer, for the tenant `token-corp` on the plan `internal` unless it says otherwise."""
    claims = {
        "iss": "https://login.example.com/", "aud": "llm-gateway", "exp": time.time() + 600,
        "tenant": "token-corp", "plan": "internal", "client_id": "support-bot",
    } | claims  # fmt: skip
    return jwt.encode(claims, TOKEN_KEY, "ES256", headers={"kid": "suite"})


def jwks() -> dict[str, Any]:
    """The issuer's key set."""
    return {"keys": [jwt.algorithms.ECAlgorithm.to_jwk(TOKEN_KEY.public_key(), as_dict=True) | {"kid": "suite"}]}


KEY = "sk-gw-suitekey0001-" + "s" * 43


def until(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> Any:
    """The condition's first true value. Polls; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)
    return value


def chat(prompt: str = "Say hello.", model: str = "support-fast", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **fields}


class Journey:
    """One test's view of the stack. `tenant` and `key` are what calls are made with unless they say otherwise."""

    tenant = "tenant-a"
    key = KEY

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.http = httpx.Client(base_url=stack.url, verify=stack.tls(), timeout=60)
        self._plain = httpx.Client(verify=False, timeout=60)  # its own context would cost each test 20 ms
        self._closing: list[Any] = [self.http, self._plain]

    def __enter__(self) -> Journey:
        return self

    def __exit__(self, *exc: object) -> None:
        for client in self._closing:
            client.close()

    # --- calls --------------------------------------------------------------------------------------------------------

    def headers(self, **more: str) -> dict[str, str]:
        """Headers of a call with a request id of its own; keyword arguments replace or add, '' leaves out."""
        headers = {
            "authorization": f"Bearer {self.key}",
            "x-tenant-id": self.tenant,
            "x-request-id": f"t-{uuid.uuid4().hex}",
        }
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        return {name: value for name, value in headers.items() if value}

    def post(self, body: Any = None, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(chat() if body is None else body).encode()
        return self.http.post(path, content=content, headers=self.headers(**headers))

    def each(self, body: dict[str, Any], **headers: str) -> list[httpx.Response]:
        """What each replica answers at its own door: Traefik draws one at random."""
        urls = [f"{replica.url}/v1/chat/completions" for replica in self.stack.replicas]
        return [self._plain.post(url, json=body, headers=self.headers(**headers)) for url in urls]

    @contextlib.contextmanager
    def stream(self, body: dict[str, Any], client: httpx.Client | None = None, **headers: str) -> Iterator[Any]:
        with (client or self.http).stream(
            "POST", "/v1/chat/completions", json=body | {"stream": True}, headers=self.headers(**headers)
        ) as response:
            yield response

    def until_refused(self, call: Callable[[], httpx.Response], most: int) -> list[httpx.Response]:
        """Calls until an answer is no longer 200, at most so often; fails unless one is."""
        answers = [call()]
        while answers[-1].status_code == 200:
            assert len(answers) < most, "nothing was refused"
            answers.append(call())
        return answers

    @contextlib.contextmanager
    def unread(self, body: dict[str, Any], headers: dict[str, str]) -> Iterator[None]:
        """A call whose client hangs up at the end of the block, without having read anything."""
        content = json.dumps(body).encode()
        head = {"host": "gateway", "content-type": "application/json", "content-length": str(len(content)), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        with (
            socket.create_connection(("127.0.0.1", self.stack.port), timeout=60) as plain,
            self.stack.tls().wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + content)
            yield

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official SDK, as an app would set it up."""
        client = openai.OpenAI(
            base_url=f"{self.stack.url}/v1",
            api_key=self.key,
            default_headers={"X-Tenant-Id": self.tenant, "X-Feature-Id": "suite"},
            http_client=openai.DefaultHttpxClient(verify=self.stack.tls()),
            max_retries=0,
            **options,
        )
        self._closing.append(client)
        return client

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        """Anthropic's official SDK, as an app would set it up."""
        client = anthropic.Anthropic(
            base_url=self.stack.url,
            api_key=self.key,
            default_headers={"X-Tenant-Id": self.tenant, "X-Feature-Id": "suite"},
            http_client=anthropic.DefaultHttpxClient(verify=self.stack.tls()),
            max_retries=0,
            **options,
        )
        self._closing.append(client)
        return client

    # --- rows ---------------------------------------------------------------------------------------------------------

    def query(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with psycopg.connect(self.stack.postgres_url, row_factory=dict_row) as connection:
            return connection.execute(sql, values).fetchall()

    def row(self, request_id: str) -> dict[str, Any]:
        """The event of a call, once it is in PostgreSQL; fails unless it is exactly one."""
        rows = until(lambda: self.query("SELECT event FROM ledger WHERE request_id = %s", request_id))
        assert len(rows) == 1
        return conforming(rows[0]["event"])

    def rows(self, request_ids: list[str]) -> dict[str, dict[str, Any]]:
        """The events of these calls, once all are in PostgreSQL; fails when one has two rows."""

        def all_there() -> list[dict[str, Any]] | None:
            found = self.query("SELECT request_id, event FROM ledger WHERE request_id = ANY(%s)", request_ids)
            return found if len({row["request_id"] for row in found}) == len(request_ids) else None

        found = until(all_there)
        assert len(found) == len(request_ids)
        return {row["request_id"]: conforming(row["event"]) for row in found}

    # --- the vendors --------------------------------------------------------------------------------------------------

    def fault(self, vendor: str = "openai", **fault: Any) -> None:
        self._sim("PUT", f"faults/{vendor}", json=fault)

    def release(self, vendor: str = "openai") -> None:
        """The vendor has no fault from now on: what it held goes on."""
        self._sim("DELETE", f"faults/{vendor}")

    def clear(self) -> None:
        """Vendors in good health, nothing counted, and no target resting from an earlier test."""
        self._sim("DELETE", "faults")
        self._sim("DELETE", "requests")
        for replica in range(len(self.stack.replicas)):
            until(lambda replica=replica: not self._wake(replica))

    def _wake(self, replica: int) -> list[str]:
        """Takes back what rests at a replica; returns what did."""
        resting = self.admin("/status", replica).json()["resting"]
        for name in resting:
            asyncio.run(tell(self.stack.redis_url, Ambient(), COOLDOWN, name, None, "suite"))
        return resting

    def asked(self, vendor: str = "openai") -> list[dict[str, Any]]:
        """The requests that a vendor got in this test, oldest first."""
        return self._sim("GET", "requests", params={"vendor": vendor})

    def counts(self, vendor: str = "openai") -> dict[str, Any]:
        return self._sim("GET", "counts").get(vendor, {})

    def _sim(self, method: str, call: str, **options: Any) -> Any:
        return (
            self._plain.request(method, f"{self.stack.simulator_url}/_sim/{call}", **options).raise_for_status().json()
        )

    # --- a replica's own port -----------------------------------------------------------------------------------------

    def admin(self, path: str, replica: int = 0, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.stack.admin_token}"}
        return self._plain.get(self.stack.replicas[replica].admin_url + path, headers=headers, **options)


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's frames, JSON decoded; `[DONE]` as it is."""
    return decoded(response.iter_lines())


def decoded(lines: Iterator[str]) -> list[Any]:
    """The same of the lines that are left."""
    data = [line[6:] for line in lines if line.startswith("data: ")]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def text(chunks: list[Any]) -> str:
    """The text that a stream's chunks carry."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        if chunk != "[DONE]" and "choices" in chunk
        for choice in chunk["choices"]
    )
