"""What tenants see of their usage: `GET /v1/usage`, and the page /usage; on the admin port the page for all.

A browser signs in with a key (on the admin port with its token), which is exchanged for a session: a signed cookie that
names the key and ends after 30 minutes. No replica keeps it; a key that is revoked ends its sessions at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from urllib.parse import parse_qs

import msgspec
from litestar import MediaType, Request, Response, get, post
from litestar.handlers import HTTPRouteHandler

from app.ambient import Ambient, same
from app.archive import ArchiveError
from app.auth import Callers, authorize, require, scope_headers
from app.config import Config, ConfigSource, Secret, ServiceKey, Tenant
from app.core import usd
from app.errors import (
    AdminForbidden,
    GatewayError,
    InvalidApiKey,
    InvalidRequest,
    IssuerUnavailable,
    TenantNotAllowed,
    UsageUnavailable,
)
from app.reports import charts, page
from app.reports.period import Figures, Usage, UsageReader
from app.telemetry import Telemetry

log = logging.getLogger("gateway")

SESSION_SECONDS = 1800
MAX_DAYS = 366
"""The longest span of a report."""
_MAX_FORM_BYTES = 4096
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Sessions:
    """Signed cookies. `secret` is shared by all replicas; each `purpose` has a key of its own made from it."""

    def __init__(self, secret: Callable[[], Secret], purpose: str, cookie: str) -> None:
        self._secret = secret
        self._purpose = purpose.encode()
        self._cookie = cookie

    def begin(self, subject: str, now: float) -> str:
        """The Set-Cookie header of a session for `subject`, which has no dot."""
        value = f"{subject}.{int(now) + SESSION_SECONDS}"
        return self._header(f"{value}.{self._signature(value)}", SESSION_SECONDS)

    def end(self) -> str:
        return self._header("", 0)

    def subject(self, cookies: Mapping[str, str], now: float) -> str | None:
        """Whose session it is; None without one, and for one that is over or not ours."""
        value, _, signature = cookies.get(self._cookie, "").rpartition(".")
        if not value or not same(signature.encode(), self._signature(value).encode()):
            return None
        subject, _, expires = value.rpartition(".")
        return subject if now < int(expires) else None

    def _signature(self, value: str) -> str:
        key = hmac.digest(self._secret().reveal().encode(), b"usage session: " + self._purpose, "sha256")
        return hmac.digest(key, value.encode(), hashlib.sha256).hex()

    def _header(self, value: str, seconds: int) -> str:
        return f"{self._cookie}={value}; Max-Age={seconds}; Path=/usage; Secure; HttpOnly; SameSite=Strict"


# --- for tenants, on the main port --------------------------------------------------------------------------------


def tenant_routes(
    source: ConfigSource, reader: UsageReader | None, ambient: Ambient, callers: Callers, telemetry: Telemetry
) -> list[HTTPRouteHandler]:
    """`GET /v1/usage` and the page, for keys with the role `usage`. Without a reader both answer 503."""
    sessions = Sessions(lambda: source.current.settings.user_id_salt, "tenant", "__Secure-gateway-usage")

    def visitor(request: Request) -> ServiceKey | None:
        """The key of the session, as long as the configuration has it and it may see usage."""
        subject = sessions.subject(request.cookies, ambient.now())
        for key in source.current.keys.values():
            if key.id == subject:
                with contextlib.suppress(InvalidApiKey):
                    callers.accepted(key, ambient.now())
                    return key if "usage" in key.roles else None
        return None

    @get("/v1/usage", media_type=MediaType.JSON)
    async def usage_api(request: Request) -> Response[bytes]:
        """The tenant's own numbers, as JSON."""
        config = source.current
        headers = scope_headers(request.scope["headers"])
        try:
            key = await callers.identify(config, headers, ambient.now())
        except (InvalidApiKey, IssuerUnavailable) as error:
            telemetry.unidentified(error)
            raise
        try:
            tenant = authorize(config, key, headers.get(b"x-tenant-id"))
        except TenantNotAllowed:
            telemetry.audit(key.id, "tenant.forge", tenant=headers.get(b"x-tenant-id", "")[:128])
            raise
        require(key, "usage")
        first, last = _asked_days(request, _today(ambient))
        environment = request.query_params.get("environment") or None
        shown = await _read(reader, tenant, first, last, environment)
        return Response(_json(shown), media_type=MediaType.JSON, headers={"cache-control": "no-store"})

    @get("/usage", media_type=MediaType.HTML)
    async def usage_page(request: Request) -> Response[bytes]:
        key = visitor(request)
        if key is None:
            return _html(page.sign_in(), 401)
        try:
            config = source.current
            allowed = [name for name in sorted(config.tenants) if key.may_act_for(name)]
            try:
                tenant = _chosen(request, config, allowed)
            except TenantNotAllowed:
                telemetry.audit(key.id, "tenant.forge", tenant=request.query_params.get("tenant", "")[:128])
                raise
            view = _view(request, ambient, allowed, tenant, everyone=False, service=key.service)
            return _html(page.usage(await _read(reader, tenant, *page.span(view.today, view.days)), view))
        except GatewayError as error:
            return _html(page.failure("Usage cannot be shown", error.message), error.status)

    @post("/usage/sign-in", request_max_body_size=_MAX_FORM_BYTES, status_code=303)
    async def sign_in(request: Request) -> Response[bytes]:
        try:
            key = callers.known(source.current, {b"x-api-key": await _form_key(request)}, ambient.now())
            if key is None:
                raise InvalidApiKey("A token cannot sign in here: send it to GET /v1/usage.")
            require(key, "usage")
        except GatewayError as error:
            if isinstance(error, InvalidApiKey):
                telemetry.unidentified(error)
            return _html(page.sign_in(error.message), error.status)
        telemetry.audit(key.id, "usage.sign_in")
        return _see_usage(sessions.begin(key.id, ambient.now()))

    @post("/usage/sign-out", status_code=303, sync_to_thread=False)
    def sign_out() -> Response[bytes]:
        return _see_usage(sessions.end())

    return [usage_api, usage_page, sign_in, sign_out, _style]


# --- for all, on the admin port -----------------------------------------------------------------------------------


def admin_routes(
    source: ConfigSource, reader: UsageReader | None, ambient: Ambient, token: Secret | None, telemetry: Telemetry
) -> list[HTTPRouteHandler]:
    """The page for all tenants, for who has the admin token. Without a token nobody can sign in."""
    sessions = Sessions(lambda: token or Secret(ambient.key_secret()), "admin", "gateway-admin-usage")

    @get("/usage", media_type=MediaType.HTML)
    async def usage_page(request: Request) -> Response[bytes]:
        if token is None or sessions.subject(request.cookies, ambient.now()) != "admin":
            return _html(page.sign_in(admin=True), 401)
        try:
            config = source.current
            tenants = sorted(config.tenants)
            tenant = _chosen(request, config, tenants) if request.query_params.get("tenant") else None
            view = _view(request, ambient, tenants, tenant, everyone=True, service="administrator")
            return _html(page.usage(await _read(reader, tenant, *page.span(view.today, view.days)), view))
        except GatewayError as error:
            return _html(page.failure("Usage cannot be shown", error.message), error.status)

    @post("/usage/sign-in", request_max_body_size=_MAX_FORM_BYTES, status_code=303)
    async def sign_in(request: Request) -> Response[bytes]:
        written = await _form_key(request)
        if token is None or not same(written.encode(), token.reveal().encode()):
            error = AdminForbidden("This is not the admin token of this replica: GATEWAY_ADMIN_TOKEN.")
            telemetry.audit("unknown", "usage.sign_in_refused")
            return _html(page.sign_in(error.message, admin=True), error.status)
        telemetry.audit("administrator", "usage.sign_in")
        return _see_usage(sessions.begin("admin", ambient.now()))

    @post("/usage/sign-out", status_code=303, sync_to_thread=False)
    def sign_out() -> Response[bytes]:
        return _see_usage(sessions.end())

    return [usage_page, sign_in, sign_out, _style]


@get("/usage/usage.css", sync_to_thread=False)
def _style() -> Response[bytes]:
    headers = {"cache-control": "max-age=3600", "x-content-type-options": "nosniff"}
    return Response(charts.style(), media_type="text/css", headers=headers)


# --- what was asked for -------------------------------------------------------------------------------------------


async def _form_key(request: Request) -> str:
    """The field `key` of a form; empty when there is none."""
    fields = parse_qs((await request.body()).decode("utf-8", "replace"))
    return fields.get("key", [""])[0].strip()


def _chosen(request: Request, config: Config, allowed: Sequence[str]) -> Tenant:
    """The tenant of the address, or the first one. One that is not allowed looks like one that does not exist."""
    if not allowed:
        raise TenantNotAllowed("This key acts for no tenant that is configured.")
    name = request.query_params.get("tenant") or allowed[0]
    if name not in allowed:
        raise TenantNotAllowed(f"This key may not act for the tenant {name!r}.")
    return config.tenants[name]


def _view(
    request: Request, ambient: Ambient, tenants: Sequence[str], tenant: Tenant | None, *, everyone: bool, service: str
) -> page.View:
    days = request.query_params.get("days", "")
    return page.View(
        today=_today(ambient),
        tenant=tenant.id if tenant else None,
        tenants=tenants,
        days=int(days) if days in map(str, page.SPANS_DAYS) else 30,
        everyone=everyone,
        service=service,
    )


def _asked_days(request: Request, today: date) -> tuple[date, date]:
    """The parameters `from` and `to`, both included: the last 30 days by default. Raises InvalidRequest."""
    days = {}
    for name in ("from", "to"):
        written = request.query_params.get(name)
        try:
            days[name] = date.fromisoformat(written) if written else None
        except ValueError:
            raise InvalidRequest(f"{name} must be a day: YYYY-MM-DD.", param=name) from None
    last = days["to"] or today
    first = days["from"] or last - timedelta(29)
    if not 0 <= (last - first).days < MAX_DAYS:
        raise InvalidRequest(f"from and to must span 1 to {MAX_DAYS} days, in that order.", param="from")
    return first, last


def _today(ambient: Ambient) -> date:
    return date.fromordinal(date(1970, 1, 1).toordinal() + int(ambient.now() // 86_400))


async def _read(
    reader: UsageReader | None, tenant: Tenant | None, first: date, last: date, environment: str | None = None
) -> Usage:
    """Raises UsageUnavailable."""
    if reader is None:
        raise UsageUnavailable("This gateway has no ledger in PostgreSQL: DATABASE_URL is not set.")
    try:
        return await reader.usage(tenant, first, last, environment)
    except ArchiveError as error:
        # Not the archive's own sentence: it names the database's host.
        log.warning("usage cannot be read: %s", error)
        raise UsageUnavailable(
            "The ledger's database cannot be read just now; calls go on. Try again in a minute.",
            retry_after_seconds=30.0,
        ) from error


# --- what goes back -----------------------------------------------------------------------------------------------


def _html(body: bytes, status: int = 200) -> Response[bytes]:
    return Response(body, status_code=status, media_type=MediaType.HTML, headers=_HEADERS)


def _see_usage(cookie: str) -> Response[bytes]:
    return Response(b"", status_code=303, headers=_HEADERS | {"location": "/usage", "set-cookie": cookie})


def _sums(figures: Figures) -> dict[str, object]:
    plain = msgspec.structs.asdict(figures)
    cost, saved = plain.pop("cost_nanos"), plain.pop("saved_nanos")
    return plain | {"cost_usd": usd(cost), "saved_usd": usd(saved)}


def _json(shown: Usage) -> bytes:
    """The report of `GET /v1/usage`; dollars are JSON numbers with at most nine decimals."""
    period, trend = shown.period, shown.trend
    hit_rate = round(period.total.cache_hits / period.total.requests, 6) if period.total.requests else None
    report = {
        "object": "usage",
        "tenant_id": period.tenant,
        "environment": period.environment,
        "from": period.first,
        "to": period.last,
        "total": _sums(period.total),
        "cache": {"hits": period.total.cache_hits, "hit_rate": hit_rate, "saved_usd": usd(period.total.saved_nanos)},
        "by_day": [{"day": day} | _sums(sums) for day, sums in period.days.items()],
        "by_feature": [{"feature_id": feature} | _sums(sums) for feature, sums in period.features.items()],
        "by_model": [
            {"model_alias": model.alias, "model_resolved": model.resolved, "provider": model.provider} | _sums(sums)
            for model, sums in period.models.items()
        ],
        "budgets": [
            {
                "unit": budget.unit,
                "window": budget.window,
                "time_zone": budget.time_zone,
                "limit": _amount(budget.unit, budget.limit),
                "used": _amount(budget.unit, budget.used),
                "left": _amount(budget.unit, budget.left),
            }
            for budget in shown.budgets
        ],
        "trend": {
            "today_usd": usd(trend.today),
            "average_usd": None if trend.average is None else usd(trend.average),
            "month_usd": usd(trend.month),
            "forecast_usd": usd(trend.forecast),
            "spike": trend.spike,
        },
    }
    return msgspec.json.encode(report)


def _amount(unit: str, value: int) -> object:
    return usd(value) if unit == "usd" else value
