"""What a tenant sees of its usage, over HTTP and in Chromium: its own numbers, and nothing that runs."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from importlib.resources import files
from pathlib import Path

import httpx
import msgspec
import pytest

from app.archive import Archive
from app.core import Cost, LedgerEvent, Usage
from app.reports.rollup import Rollups
from loadtest.stack import Stack
from tests.browser import Browser, chromedriver
from tests.journey import OTHER_KEY, VIEWER_KEY, Journey, until
from tests.ledger_parts import AMBIENT, an_event, wait_until
from tests.test_keys import audit_lines

DAY_SECONDS = 86_400.0
EVIL = "<script>document.title='stolen'</script>"
"""A feature's name that no front door would take, for the page must not rely on that."""
MINE, OTHERS = 123_456_789, 987_654_321
COOKIE = "__Secure-gateway-usage"
TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(scope="module")
def events(stack: Stack) -> list[LedgerEvent]:
    """Some weeks of calls of two tenants, in the stack's ledger."""
    now = time.time()
    made = []
    for tenant, nanos in (("usage-a", MINE), ("usage-b", OTHERS)):
        for back in range(25):
            for number in range(1 + back % 5):
                event = an_event(
                    at=now - back * DAY_SECONDS - number,
                    tenant=tenant,
                    feature=[EVIL, "support-chat", "search", None][(back + number) % 4],
                    alias=["support-fast", "support-quality"][number % 2],
                    status=["success", "success", "success", "error", "rate_limited"][number],
                    usage=Usage(input=100 + back, output=40 + number),
                    cost=Cost(nanos, nanos * number),
                    saved_nanos=5_000_000 if number == 2 else 0,
                )
                made.append(msgspec.structs.replace(event, cache_hit=number == 2))

    async def fill() -> None:
        archive = Archive(stack.postgres_url, AMBIENT)
        try:
            await archive.prepare()
            await archive.insert([msgspec.json.encode(event).decode() for event in made])
            rollups = Rollups(archive)  # where the suite made some before, days that are over come from them
            await rollups.prepare()
            await rollups.run_once()
        finally:
            await archive.close()

    asyncio.run(fill())
    return made


def cost(events: list[LedgerEvent]) -> Decimal:
    return sum((Decimal(bytes(event.cost_usd.total).decode()) for event in events), Decimal(0))


def ask(journey: Journey, key: str = VIEWER_KEY, tenant: str = "usage-a", **parameters: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", "x-tenant-id": tenant}
    return journey.http.get("/v1/usage", headers=headers, params=parameters)


# --- GET /v1/usage ------------------------------------------------------------------------------------------------


def test_a_tenant_gets_the_exact_sums_of_its_own_rows(journey: Journey, events: list[LedgerEvent]) -> None:
    report = json.loads(ask(journey).text, parse_float=Decimal)
    mine = [event for event in events if event.tenant_id == "usage-a"]
    assert report["tenant_id"] == "usage-a"
    assert report["total"]["requests"] == len(mine)
    assert report["total"]["cost_usd"] == cost(mine)
    assert report["total"]["total_tokens"] == sum(event.usage.total_tokens for event in mine)
    assert report["cache"]["hits"] == sum(event.cache_hit for event in mine)
    for group in ("by_day", "by_feature", "by_model"):
        assert sum(line["cost_usd"] for line in report[group]) == cost(mine), group


def test_a_span_of_days_can_be_asked_for(journey: Journey, events: list[LedgerEvent]) -> None:
    day = events[0].timestamp[:10]
    report = json.loads(ask(journey, **{"from": day, "to": day}).text, parse_float=Decimal)
    mine = [event for event in events if event.tenant_id == "usage-a" and event.timestamp.startswith(day)]
    assert [line["day"] for line in report["by_day"]] == [day]
    assert report["total"]["cost_usd"] == cost(mine)


def test_the_budget_that_is_left_is_told(journey: Journey, events: list[LedgerEvent]) -> None:
    today = datetime.now(UTC).date().isoformat()
    mine = [event for event in events if event.tenant_id == "usage-a" and event.timestamp.startswith(today)]
    used = sum(event.usage.total_tokens for event in mine)
    assert ask(journey).json()["budgets"] == [
        {"unit": "tokens", "window": "day", "time_zone": "UTC", "limit": 10_000, "used": used, "left": 10_000 - used}
    ]


@pytest.mark.parametrize(
    ("key", "tenant", "status", "code"),
    [
        (VIEWER_KEY, "usage-b", 403, "tenant_not_allowed"),
        (VIEWER_KEY, "nobody", 403, "tenant_not_allowed"),
        (VIEWER_KEY, "", 401, "tenant_required"),
        (OTHER_KEY, "tenant-b", 403, "role_required"),
        (OTHER_KEY, "usage-a", 403, "tenant_not_allowed"),
        ("sk-gw-nosuchkey001-" + "n" * 43, "usage-a", 401, "invalid_api_key"),
    ],
)
def test_usage_is_told_to_its_tenants_usage_key_only(
    journey: Journey, events: list[LedgerEvent], key: str, tenant: str, status: int, code: str
) -> None:
    answer = ask(journey, key, tenant)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    "parameters", [{"from": "yesterday"}, {"from": "2026-02-30"}, {"from": "2020-01-01"}, {"from": "9999-12-31"}]
)
def test_a_span_that_cannot_be_read_is_refused(
    journey: Journey, events: list[LedgerEvent], parameters: dict[str, str]
) -> None:
    answer = ask(journey, **parameters)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


def test_a_key_that_only_sees_usage_cannot_call(journey: Journey) -> None:
    answer = journey.post(authorization=f"Bearer {VIEWER_KEY}", x_tenant_id="usage-a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "role_required")
    assert journey.row(answer.headers["x-request-id"])["status"] == "refused"


def test_usage_says_so_when_the_database_is_away(journey: Journey, events: list[LedgerEvent]) -> None:
    journey.stack.freeze("postgres")
    try:
        answer = ask(journey)
        call = journey.post()
    finally:
        journey.stack.thaw("postgres")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert "cannot be read just now; calls go on" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "30"
    assert call.status_code == 200
    until(lambda: {ask(journey).status_code for _ in range(6)} == {200})


# --- the session --------------------------------------------------------------------------------------------------


def sign_in(journey: Journey, key: str = VIEWER_KEY) -> httpx.Response:
    return journey.http.post("/usage/sign-in", data={"key": key})


def test_a_key_is_exchanged_for_a_cookie_that_scripts_and_other_sites_do_not_get(journey: Journey) -> None:
    answer = sign_in(journey)
    assert (answer.status_code, answer.headers["location"]) == (303, "/usage")
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert cookie.startswith(f"{COOKIE}=viewerkey001.")
    assert set(attributes) == {"Max-Age=1800", "Path=/usage", "Secure", "HttpOnly", "SameSite=Strict"}
    assert VIEWER_KEY not in answer.headers["set-cookie"]


@pytest.mark.parametrize(("key", "status"), [(OTHER_KEY, 403), ("nonsense", 401), ("", 401), ("ü" * 3000, 413)])
def test_a_key_that_may_not_see_usage_gets_no_session(journey: Journey, key: str, status: int) -> None:
    answer = sign_in(journey, key)
    assert answer.status_code == status
    assert "set-cookie" not in answer.headers


def page(journey: Journey, cookie: str | None = None, **parameters: str) -> httpx.Response:
    if cookie is None:
        cookie = sign_in(journey).headers["set-cookie"].partition(";")[0]
    journey.http.cookies.clear()
    return journey.http.get("/usage", headers={"cookie": cookie}, params=parameters)


def test_the_page_shows_the_tenants_numbers_and_nobody_elses(journey: Journey, events: list[LedgerEvent]) -> None:
    shown = page(journey)
    assert shown.status_code == 200
    assert f"${cost([event for event in events if event.tenant_id == 'usage-a']):,.2f}" in shown.text
    assert "usage-b" not in shown.text


def test_the_page_of_another_tenant_cannot_be_asked_for(journey: Journey, events: list[LedgerEvent]) -> None:
    shown = page(journey, tenant="usage-b")
    assert shown.status_code == 403
    assert "may not act for the tenant" in shown.text
    assert f"${cost([event for event in events if event.tenant_id == 'usage-b']):,.2f}" not in shown.text


def test_who_signs_in_and_who_asks_for_another_tenant_are_audit_lines(journey: Journey) -> None:
    asked = f"other-{AMBIENT.key_id()}"
    page(journey, tenant=asked)

    def lines() -> list[tuple[object, ...]]:
        logs = [journey.stack.log_dir / f"{replica.name}.log" for replica in journey.stack.replicas]
        found = [line for log in logs for line in audit_lines(log.read_text())]
        return [(line["who"], line["action"], line.get("tenant")) for line in found if line["who"] == "viewerkey001"]

    until(lambda: ("viewerkey001", "tenant.forge", asked) in lines())
    assert ("viewerkey001", "usage.sign_in", None) in lines()


@pytest.mark.parametrize("kind", ["signature", "subject", "expired", "longer", "garbage"])
def test_a_cookie_that_is_not_ours_is_no_session(journey: Journey, kind: str) -> None:
    value = sign_in(journey).headers["set-cookie"].partition(";")[0].partition("=")[2]
    subject, expires, signature = value.split(".")
    forged = {
        "signature": f"{subject}.{expires}.{'0' * 64}",
        "subject": f"otherkey0001.{expires}.{signature}",
        "expired": f"{subject}.1000000000.{signature}",
        "longer": f"{subject}.{int(expires) + 1}.{signature}",
        "garbage": "......",
    }[kind]
    assert page(journey, f"{COOKIE}={value}").status_code == 200
    assert page(journey, f"{COOKIE}={forged}").status_code == 401


def test_a_session_of_one_port_is_none_on_the_other(journey: Journey) -> None:
    value = sign_in(journey).headers["set-cookie"].partition(";")[0].partition("=")[2]
    answer = httpx.get(
        journey.stack.replicas[0].admin_url + "/usage", headers={"cookie": f"gateway-admin-usage={value}"}, timeout=60
    )
    assert answer.status_code == 401


def test_signing_out_ends_the_session(journey: Journey) -> None:
    answer = journey.http.post("/usage/sign-out")
    assert answer.headers["set-cookie"].startswith(f"{COOKIE}=; Max-Age=0;")


def test_every_page_forbids_scripts_and_frames(journey: Journey) -> None:
    for answer in (page(journey), page(journey, "none=1"), sign_in(journey), sign_in(journey, "nonsense")):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'; form-action 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.status_code == 303 or answer.headers["content-type"] == "text/html; charset=utf-8"
    assert journey.http.get("/usage/usage.css").headers["content-type"] == "text/css; charset=utf-8"


# --- in Chromium --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromedriver(tmp_path_factory.mktemp("chromedriver")) as url:
        yield url


@pytest.fixture
def browser(driver: str) -> Iterator[Browser]:
    browser = Browser(driver)
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def signed_in(browser: Browser, stack: Stack, events: list[LedgerEvent]) -> Browser:
    sign_into(browser, stack.url, VIEWER_KEY)
    return browser


def sign_into(browser: Browser, url: str, key: str) -> None:
    """Through the form, until the page is there: a click returns before what it asked for has come."""
    browser.open(f"{url}/usage")
    browser.type("#key", key)
    browser.click("form button")
    wait_until(lambda: browser.title.startswith("Usage of"), "the page is shown")


def keep(browser: Browser, name: str) -> None:
    """Where the variable SCREENSHOTS names a folder, the page as it looks."""
    if folder := os.environ.get("SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}.png")


def test_a_person_signs_in_and_sees_the_page(signed_in: Browser) -> None:
    keep(signed_in, "tenant")
    assert signed_in.title == "Usage of usage-a - LLM gateway"
    assert "Tokens a day (UTC)" in signed_in.text()
    assert "forecast at its end" in signed_in.text()


def test_the_browser_finds_nothing_to_complain_of(signed_in: Browser) -> None:
    assert signed_in.run("return getComputedStyle(document.querySelector('.tiles')).display") == "grid"
    assert [line for line in signed_in.complaints() if "401" not in line] == []


def test_bars_are_drawn_as_high_as_the_figures_say(signed_in: Browser, events: list[LedgerEvent]) -> None:
    """A style sheet alone draws them, under a policy that takes no style attribute."""
    said, shares = signed_in.run(
        """
        const rows = [...document.querySelector('figure table').rows];
        return [rows.map((row) => row.title), rows.map((row) => row.cells[0].offsetHeight / row.clientHeight)];
        """
    )
    spent = [float(each.rpartition("$")[2]) for each in said]
    assert max(spent) > 0
    for dollars, share in zip(spent, shares, strict=True):
        assert share == pytest.approx(max(shares) * dollars / max(spent), abs=0.02)
    assert signed_in.run("return document.querySelectorAll('[style]').length") == 0


def test_the_chart_library_is_vendored_with_its_licence() -> None:
    folder = files("app.reports").joinpath("vendored")
    assert folder.joinpath("charts.LICENSE").read_text().startswith("MIT License")
    assert "Charts.css 1.2.0" in folder.joinpath("charts.min.css").read_text()[:100]


def test_a_planted_script_is_shown_as_text(signed_in: Browser) -> None:
    assert EVIL in signed_in.text()
    assert signed_in.title != "stolen"
    assert signed_in.run("return document.scripts.length") == 0


def test_scripts_would_not_run_even_if_one_got_in(signed_in: Browser) -> None:
    signed_in.run("const s = document.createElement('script'); s.textContent = arguments[0]; document.body.append(s)",
                  "document.title = 'stolen'")  # fmt: skip
    assert signed_in.title == "Usage of usage-a - LLM gateway"


def test_the_session_is_out_of_scripts_reach(signed_in: Browser) -> None:
    assert signed_in.run("return document.cookie") == ""


def test_every_chart_and_table_has_a_name_for_screen_readers(signed_in: Browser) -> None:
    nodes = [node for node in signed_in.accessibility() if not node["ignored"]]
    named = {role: [] for role in ("image", "table", "meter", "button", "link", "columnheader", "heading")}
    for node in nodes:
        role = {"img": "image"}.get(node["role"]["value"], node["role"]["value"])
        if role in named:
            named[role].append(node.get("name", {}).get("value", ""))
    assert len(named["image"]) == 3
    assert all(name.startswith(("Spend, ", "Requests, ", "Tokens, ")) for name in named["image"])
    assert {"Features", "Models"} <= set(named["table"])
    assert [role for role, names in named.items() if not names or not all(names)] == []


def test_the_keyboard_reaches_everything(driver: str, stack: Stack, events: list[LedgerEvent]) -> None:
    browser = Browser(driver)
    try:
        browser.open(f"{stack.url}/usage")
        browser.press(*VIEWER_KEY, ENTER)  # the field has the focus
        wait_until(lambda: "Usage of usage-a" in browser.title, "the page is shown")
        reached = []
        for _ in range(9):
            browser.press(TAB)
            reached.append(browser.run("return document.activeElement.textContent"))
        assert reached[:5] == ["Skip to content", "Sign out", "7 days", "30 days", "90 days"]
        assert "Every day as a table" in reached
    finally:
        browser.close()


def contrast(browser: Browser, selector: str) -> float:
    """Of text on its ground, as WCAG 2 measures it."""
    return browser.run(
        """
        const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
          .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const element = document.querySelector(arguments[0]);
        let ground = element;
        while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
        const [a, b] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(light);
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        """,
        selector,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(signed_in: Browser, scheme: str) -> None:
    signed_in.emulate(prefers_color_scheme=scheme)
    keep(signed_in, f"tenant-{scheme}")
    dark = signed_in.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    for selector in ("h1", ".hint", ".note", "nav a", ".wide td", ".chart li", "button", "dt"):
        assert contrast(signed_in, selector) >= 4.5, selector


def test_the_page_fits_a_telephone(driver: str, stack: Stack, events: list[LedgerEvent]) -> None:
    browser = Browser(driver, width=500, height=900)
    try:
        sign_into(browser, stack.url, VIEWER_KEY)
        keep(browser, "telephone")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.close()


def test_the_administrator_sees_all_tenants(browser: Browser, stack: Stack, events: list[LedgerEvent]) -> None:
    sign_into(browser, stack.replicas[0].admin_url, stack.admin_token)
    keep(browser, "admin")
    assert browser.title == "Usage of all tenants - LLM gateway"
    text = browser.text()
    assert "usage-a" in text
    assert "usage-b" in text


def test_the_administrators_token_is_no_key_and_a_key_no_token(stack: Stack, journey: Journey) -> None:
    admin_url = stack.replicas[0].admin_url + "/usage/sign-in"
    assert httpx.post(admin_url, data={"key": VIEWER_KEY}, timeout=60).status_code == 403
    assert sign_in(journey, stack.admin_token).status_code == 401
