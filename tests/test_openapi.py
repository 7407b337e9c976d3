"""The document at /schema: valid, and of the routes that there are."""

from __future__ import annotations

import json
import re

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from app.dialects import ROUTES, openai_responses
from app.openapi import CALLS, codes, document
from tests.journey import Journey
from tests.test_security import OPEN, all_routes


def test_the_document_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(document()).validate()


def test_the_document_is_of_all_routes_of_the_main_port_and_no_other() -> None:
    described = {
        (method.upper(), path)
        for path, methods in document()["paths"].items()
        for method in methods
        if method != "parameters"
    }
    assert described == {
        (method, re.sub(r"\{(\w+):\w+\}", r"{\1}", path)) for port, method, path in all_routes() if port == "main"
    }
    assert set(CALLS) == set(ROUTES)


@pytest.mark.parametrize(
    ("part", "names"), [("", {"include"}), ("/input_items", {"include", "limit", "order", "after"})]
)
def test_the_parameters_of_a_kept_answer_are_those_that_it_is_asked_with(part: str, names: set[str]) -> None:
    said = document()["paths"]["/v1/responses/{id}" + part]["get"]["parameters"]
    asked = openai_responses.read_kept("GET", "resp_1" + part, "&".join(f"{name}=1" for name in sorted(names)))
    assert {one["name"] for one in said if one["in"] == "query"} == {name for name, _ in asked.query} == names


def test_routes_that_ask_for_no_credential_are_those_that_are_said_to() -> None:
    pages = "/usage"  # which ask in a form
    said = {
        (method.upper(), path)
        for path, methods in document()["paths"].items()
        for method, told in methods.items()
        if told.get("security") == [] and not path.startswith(pages)
    }
    assert said == {(method, path) for port, method, path in OPEN if port == "main" and not path.startswith(pages)}


@pytest.mark.parametrize("path", CALLS)
def test_what_is_said_to_be_required_is(journey: Journey, path: str) -> None:
    call = CALLS[path]
    if call.form:
        answer = journey.http.post(path, files={"other": ("a.txt", b"1")}, headers=journey.headers())
    else:
        answer = journey.post({"model": "one-target"}, path=path)
    assert answer.status_code == 400
    assert (answer.json()["error"].get("param") or "model") in {"model", *call.required}


def test_the_document_is_served_without_a_credential_and_names_every_code(journey: Journey) -> None:
    answer = journey.http.get("/schema")
    assert answer.json() == json.loads(json.dumps(document()))
    assert all(code in answer.text for code in codes())
    assert codes()["rate_limit_exceeded"] == 429
