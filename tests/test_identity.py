"""Who calls, through the real Traefik: tokens, client certificates, and what a client can do to pass for another."""

from __future__ import annotations

import http.client
import json
import re
import ssl
from pathlib import Path

import httpx
import pytest

from loadtest import local_ca
from loadtest.stack import Stack
from tests.journey import KEY, Journey, chat, token
from tests.test_readme import ROOT, checkout, parses, shell  # noqa: F401, `checkout` is a fixture

CHAT = "/v1/chat/completions"
FORGED = {
    "x-forwarded-tls-client-cert-info": "Subject%3D%22CN%3Dlocal-dev%22",
    "x-tenant-id": "local-dev",
    "content-type": "application/json",
}
"""What Traefik would say of a client with the local certificate."""


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_tenant_without_a_row_calls_by_its_token_and_has_its_plan(journey: Journey) -> None:
    answer = journey.post(chat("tokens=2"), authorization=f"Bearer {token()}", x_tenant_id="")
    assert answer.status_code == 200
    row = journey.row(answer.headers["x-request-id"])
    assert (row["tenant_id"], row["rate_limit_tier"]) == ("token-corp", "internal")
    assert row["key_id"] == "jwt.sso.support-bot"


def test_plan_of_a_token_limits_its_tenant(journey: Journey) -> None:
    free = token(tenant="token-free", plan="free")
    answer = journey.post(chat("tokens=2"), authorization=f"Bearer {free}", x_tenant_id="token-free")
    assert answer.headers["x-ratelimit-limit-requests"] == "30"
    refused = journey.post(chat(model="support-quality"), authorization=f"Bearer {free}", x_tenant_id="token-free")
    assert code(refused) == (403, "model_not_allowed")


def test_models_of_a_token_s_plan_are_listed(journey: Journey) -> None:
    headers = {"authorization": f"Bearer {token(plan='free')}"}
    listed = journey.http.get("/v1/models", headers=headers).json()["data"]
    assert [model["id"] for model in listed] == ["support-fast"]


@pytest.mark.parametrize(
    ("claims", "tenant", "expected"),
    [
        ({}, "tenant-a", (403, "tenant_not_allowed")),
        ({"tenant": "tenant-a"}, "", (403, "tenant_not_allowed")),
        ({"tenant": ["token-a", "token-b"]}, "", (401, "tenant_required")),
        ({"plan": "no-such"}, "", (403, "tenant_not_allowed")),
        ({"exp": 1}, "", (401, "invalid_api_key")),
        ({"aud": "another"}, "", (401, "invalid_api_key")),
    ],
)
def test_token_reaches_no_further_than_its_issuer_may_go(
    journey: Journey, claims: dict[str, object], tenant: str, expected: tuple[int, str]
) -> None:
    answer = journey.post(chat(), authorization=f"Bearer {token(**claims)}", x_tenant_id=tenant)
    assert code(answer) == expected


# --- client certificates ----------------------------------------------------------------------------------------------


def client(stack: Stack, certificates: local_ca.Certificates) -> httpx.Client:
    tls = ssl.create_default_context(cafile=str(stack.ca_file))
    tls.load_cert_chain(certificates.client_cert_file, certificates.client_key_file)
    return httpx.Client(base_url=stack.url, verify=tls, timeout=30)


def test_client_certificate_is_a_service(journey: Journey, stack: Stack) -> None:
    with client(stack, local_ca.ensure(stack.ca_file.parent)) as certified:
        answer = certified.post(CHAT, json=chat("tokens=2"), headers={"x-tenant-id": "local-dev"})
    assert answer.status_code == 200
    row = journey.row(answer.headers["x-request-id"])
    assert (row["key_id"], row["tenant_id"]) == ("cert.local-dev", "local-dev")


def test_client_certificate_acts_for_its_tenants_only(stack: Stack) -> None:
    with client(stack, local_ca.ensure(stack.ca_file.parent)) as certified:
        assert code(certified.post(CHAT, json=chat(), headers={"x-tenant-id": "tenant-a"}))[0] == 403


def test_client_certificate_of_another_authority_gets_no_connection(stack: Stack, tmp_path: Path) -> None:
    with client(stack, local_ca.ensure(tmp_path)) as foreign, pytest.raises((httpx.ConnectError, httpx.ReadError)):
        foreign.post(CHAT, json=chat(), headers={"x-tenant-id": "local-dev"})


@pytest.mark.parametrize("more", [{}, {"x-gateway-edge": "guessed"}, {"x-gateway-edge": ""}])
def test_forged_subject_is_nobody_behind_traefik(journey: Journey, more: dict[str, str]) -> None:
    answer = journey.http.post(CHAT, json=chat(), headers=FORGED | more)
    assert code(answer) == (401, "invalid_api_key")


@pytest.mark.parametrize("more", [{}, {"x-gateway-edge": "guessed"}, {"x-gateway-edge": ""}])
def test_forged_subject_is_nobody_at_a_replica_itself(stack: Stack, more: dict[str, str]) -> None:
    answer = httpx.post(stack.replicas[0].url + CHAT, json=chat(), headers=FORGED | more, timeout=60)
    assert code(answer) == (401, "invalid_api_key")


# --- tricks with proxies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_client_that_has_its_credential_stripped_on_the_way_is_nobody(stack: Stack, header: str) -> None:
    value = f"Bearer {KEY}" if header == "Authorization" else KEY
    connection = http.client.HTTPSConnection("127.0.0.1", stack.port, timeout=60, context=stack.tls())
    headers = {header: value, "Connection": f"keep-alive, {header}", "X-Tenant-Id": "tenant-a"}
    connection.request("POST", CHAT, json.dumps(chat()), headers)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (401, "invalid_api_key")
    connection.close()


def test_client_that_has_its_tenant_stripped_on_the_way_has_none(stack: Stack) -> None:
    connection = http.client.HTTPSConnection("127.0.0.1", stack.port, timeout=60, context=stack.tls())
    headers = {"Authorization": f"Bearer {KEY}", "Connection": "X-Tenant-Id", "X-Tenant-Id": "tenant-a"}
    connection.request("POST", CHAT, json.dumps(chat()), headers)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (401, "tenant_required")
    connection.close()


# --- the page for operators -------------------------------------------------------------------------------------------


def test_commands_of_the_page_work_when_pasted(checkout: Path) -> None:  # noqa: F811
    page = (ROOT / "runbooks" / "identity.md").read_text()
    for commands in re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        ran = shell(commands, checkout)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout


def test_command_lines_of_the_page_are_ones() -> None:
    page = (ROOT / "runbooks" / "identity.md").read_text()
    lines = re.findall(r"`(gateway keys [^`]+)`", page)
    assert len(lines) >= 2
    assert [line for line in lines if not parses(line)] == []
