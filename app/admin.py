"""The second port: metrics, and what this replica knows of itself. Its token is not a gateway key."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from litestar import MediaType, Response, get
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler, HTTPRouteHandler
from litestar.types import ASGIApp

from app.ambient import same
from app.api import Routes, answer_error, answer_http_error
from app.config import Secret
from app.errors import AdminForbidden, GatewayError, InvalidApiKey
from app.telemetry import Telemetry


def is_admin(written: str | None, token: Secret | None) -> bool:
    """Whether an Authorization header has the admin token. False without one; raises AdminForbidden for another."""
    if written is None:
        return False
    if token is None or not same(written.encode(), b"Bearer " + token.reveal().encode()):
        raise AdminForbidden("This is not the admin token of this replica: GATEWAY_ADMIN_TOKEN.")
    return True


def app(
    token: Secret | None,
    telemetry: Telemetry,
    status: Callable[[], dict[str, object]],
    more: Sequence[HTTPRouteHandler] = (),
) -> ASGIApp:
    """The routes of the admin port, with `more` of other doors. Without a token nothing but health answers."""

    def admin_only(connection: ASGIConnection, _: BaseRouteHandler) -> None:
        if not is_admin(connection.headers.get("authorization"), token):
            raise InvalidApiKey("The admin port wants `Authorization: Bearer <GATEWAY_ADMIN_TOKEN>`.")

    @get("/metrics", guards=[admin_only], media_type=MediaType.TEXT, sync_to_thread=False)
    def metrics() -> Response[bytes]:
        return Response(telemetry.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @get("/status", guards=[admin_only], media_type=MediaType.JSON, sync_to_thread=False)
    def show_status() -> Response[bytes]:
        return Response(msgspec.json.encode(status()), media_type=MediaType.JSON)

    @get("/health", media_type=MediaType.TEXT, sync_to_thread=False)
    def health() -> str:
        return "ok"

    return Routes(
        [metrics, show_status, health, *more],
        exception_handlers={GatewayError: answer_error, HTTPException: answer_http_error},
        openapi_config=None,
        logging_config=None,
    )
