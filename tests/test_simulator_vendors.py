"""The simulator's Azure and compatible vendors: their paths, keys and errors; Azure's structure as it was recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from loadtest.simulator.inprocess import running
from tests import recordings
from tests.recordings import Exchange
from tests.simulation import http, put_fault, say
from tests.test_recordings import stream_structure, structure

FOLDER = os.environ.get("RECORDINGS")
needs_recordings = pytest.mark.skipif(not FOLDER, reason="RECORDINGS names no folder of recorded vendor traffic")
AZURE = [one for one in recordings.load(FOLDER) if one.vendor == "azure-openai"] if FOLDER else []
DEPLOYMENT = "/azure/openai/deployments/gpt-4.1-mini-2025-04-14/chat/completions?api-version=2024-10-21"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    http("DELETE", f"{server}/_sim/faults").raise_for_status()
    return server


def azure(url: str, path: str = DEPLOYMENT, key: str = "any", **request: Any) -> httpx.Response:
    return http("POST", url + path, json=request or say("hi"), headers={"api-key": key})


def compatible(url: str, vendor: str, key: str = "any", **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return http("POST", f"{url}/{vendor}/v1/chat/completions", json=say("tokens=3", **fields), headers=headers)


# --- Azure ------------------------------------------------------------------------------------------------------------


def test_the_deployment_in_the_path_answers_whatever_model_the_body_names(url: str) -> None:
    assert azure(url, **say("hi", model="gpt-4o")).json()["model"] == "gpt-4.1-mini-2025-04-14"


def test_the_versionless_api_takes_the_deployment_from_the_body(url: str) -> None:
    answer = azure(url, "/azure/openai/v1/chat/completions", **say("hi", model="gpt-4o-mini"))
    assert answer.json()["model"] == "gpt-4o-mini-2024-07-18"


@pytest.mark.parametrize("path", [DEPLOYMENT.partition("?")[0], "/azure/v1/chat/completions"])
def test_a_path_that_azure_does_not_have_is_not_found(url: str, path: str) -> None:
    assert azure(url, path).status_code == 404


def test_an_answer_that_openai_keeps_is_not_azures(url: str) -> None:
    bearer = {"authorization": "Bearer any"}
    kept = http("POST", f"{url}/openai/v1/responses", json={"model": "gpt-4o", "input": "Hi"}, headers=bearer).json()
    asked = [
        http("GET", f"{url}/{path}/v1/responses/{kept['id']}", headers=bearer | {"api-key": "any"})
        for path in ("openai", "azure/openai")
    ]
    assert [answer.status_code for answer in asked] == [200, 404]


def test_a_provider_named_after_its_region_speaks_azures_shape(url: str) -> None:
    assert "prompt_filter_results" in azure(url, DEPLOYMENT.replace("/azure/", "/azure-eu/")).json()


def test_a_filtered_choice_has_no_message(url: str) -> None:
    (choice,) = azure(url, **say("filtered=1")).json()["choices"]
    assert "message" not in choice
    assert choice["finish_reason"] == "content_filter"


def pick(part: str, index: int = 0) -> Exchange:
    (found,) = [one for one in AZURE if part in one.file and one.index == index]
    return found


@needs_recordings
def test_a_stream_of_azures_is_built_like_the_recorded_one(url: str) -> None:
    recorded = pick("completion_azure_stream")
    path = "/azure/openai/deployments/gpt-5/chat/completions?api-version=2024-12-01-preview"
    without = {"content_filter_results"}  # which categories stand beside a delta is the deployment's policy
    ours = stream_structure(azure(url, path, **recorded.request.json()).text, without)
    assert ours == stream_structure(recorded.response.body.decode(), without)


@needs_recordings
def test_an_answer_of_azures_is_built_like_the_recorded_one(url: str) -> None:
    recorded = pick("content_filtering", index=1)
    without = {"content_filter_results"}
    ours = structure(azure(url, **recorded.request.json()).json(), True, without)
    assert ours == structure(recorded.response.json(), True, without)


@needs_recordings
def test_embeddings_of_azures_are_built_like_the_recorded_ones(url: str) -> None:
    recorded = pick("azure_embedding")
    path = "/azure/openai/deployments/text-embedding-ada-002/embeddings?api-version=2023-07-01-preview"
    ours = azure(url, path, **recorded.request.json()).json()
    assert structure(ours, True) == structure(recorded.response.json(), True)


@needs_recordings
def test_errors_of_azures_are_built_like_the_recorded_ones(url: str) -> None:
    bad_key = azure(url, key="bad-key")
    put_fault(url, "azure", kind="throttle", retry_after=1, retry_after_ms=0)
    throttled = azure(url)
    for ours, part in ((bad_key, "raises_appropriate_auth_error"), (throttled, "context_length_exceeded_errors")):
        recorded = pick(part).response
        assert ours.status_code == recorded.status
        assert structure(ours.json(), True) == structure(recorded.json(), True)
        assert ours.json()["error"]["code"] == recorded.json()["error"]["code"]
        for name in ("retry-after", "retry-after-ms"):
            assert ours.headers.get(name) == recorded.header(name)


# --- compatible vendors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vendor", "status"), [("mistral", 401), ("groq", 401), ("deepseek", 401), ("xai", 400)])
def test_a_bad_key_has_the_vendors_status(url: str, vendor: str, status: int) -> None:
    assert compatible(url, vendor, key="bad-key").status_code == status


def test_mistral_refuses_what_it_does_not_know(url: str) -> None:
    answer = compatible(url, "mistral", max_completion_tokens=3)
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["body", "max_completion_tokens"])


@pytest.mark.parametrize("vendor", ["deepseek", "groq", "mistral"])
def test_usage_comes_unasked_with_the_chunk_that_ends_a_stream(url: str, vendor: str) -> None:
    *_, last, done = [line[6:] for line in compatible(url, vendor, stream=True).text.splitlines() if line]
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == "stop"
    assert json.loads(last)["usage"]["completion_tokens"] == 3


def test_groq_writes_its_errors_as_events(url: str) -> None:
    put_fault(url, "groq", kind="error_event", after_chunks=1)
    assert "event: error\ndata: " in compatible(url, "groq", stream=True).text
