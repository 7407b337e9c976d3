"""Embeddings through the whole stack: Traefik, the official SDK, the row in PostgreSQL."""

from __future__ import annotations

from decimal import Decimal

import openai
import pytest

from tests.journey import Journey, chat


def test_sdk_gets_the_same_vectors_in_base64_as_in_numbers(journey: Journey) -> None:
    client = journey.openai()
    packed = client.embeddings.create(model="embed-small", input=["anchor harbor", "harbor lantern"], dimensions=64)
    plain = client.embeddings.create(
        model="embed-small", input=["anchor harbor", "harbor lantern"], dimensions=64, encoding_format="float"
    )
    assert [request["body"].get("encoding_format") for request in journey.asked()] == ["base64", "float"]
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
    assert packed.usage.total_tokens == plain.usage.total_tokens > 0


def test_row_of_embeddings_has_their_tokens_and_their_price(journey: Journey) -> None:
    answer = journey.post({"model": "embed-small", "input": "anchor harbor"}, path="/v1/embeddings")
    tokens = answer.json()["usage"]["prompt_tokens"]
    event = journey.row(answer.headers["x-request-id"])
    assert (event["operation"], event["status"], event["stream"]) == ("embeddings", "success", False)
    assert event["usage"]["embedding_tokens"] == event["usage"]["total_tokens"] == tokens
    assert event["usage"]["classes"]["embedding"] == tokens
    assert event["usage_source"] == "vendor"
    assert int(answer.headers["x-usage-total-tokens"]) == tokens
    (row,) = journey.query("SELECT cost_usd FROM ledger WHERE request_id = %s", answer.headers["x-request-id"])
    assert row["cost_usd"] == (Decimal("0.02") * tokens / 1_000_000).quantize(Decimal("1e-9"))


def test_embeddings_fall_back_to_the_next_vendor(journey: Journey) -> None:
    journey.fault("openai", kind="status", status=503)
    answer = journey.post({"model": "embed-chain", "input": [[9906, 11], [1917]]}, path="/v1/embeddings")
    assert (answer.status_code, len(answer.json()["data"])) == (200, 2)
    event = journey.row(answer.headers["x-request-id"])
    assert (event["provider"], event["fallback_used"]) == ("openrouter", True)


def test_embeddings_count_against_the_tenants_budget(journey: Journey) -> None:
    answer = journey.post(
        {"model": "embed-small", "input": "anchor " * 3_000}, path="/v1/embeddings", x_tenant_id="tenant-poor"
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "budget_exceeded")


def test_a_route_that_the_model_does_not_serve_is_refused_before_a_vendor_is_asked(journey: Journey) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        journey.openai().chat.completions.create(**chat(model="embed-small"))
    assert raised.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        journey.openai().embeddings.create(model="support-fast", input="a")
    assert journey.asked() == []
