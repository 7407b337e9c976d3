"""`POST /admin/cache/invalidate` on the admin port: whoever takes documents in says what has changed."""

from __future__ import annotations

import msgspec
from litestar import MediaType, Request, Response, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from app.admin import is_admin
from app.cache import Cache, Scope
from app.cache.wishes import TAG
from app.config import NAME, Secret
from app.config.caching import REVISION
from app.errors import CacheUnavailable, InvalidApiKey, InvalidRequest
from app.redis_pipe import RedisAway, RedisRefused
from app.telemetry import Telemetry

MAX_BODY_BYTES = 65_536
_SHAPES = {"tenant": NAME, "alias": NAME, "revision": REVISION, "tag": TAG, "id": TAG}


class _Asked(Struct, forbid_unknown_fields=True):
    tenant: str | None = None
    alias: str | None = None
    revision: str | None = None
    tag: str | None = None
    id: str | None = None


def read(body: bytes) -> tuple[Scope, str | None]:
    """What is to be invalidated, and the id that makes it idempotent. Raises InvalidRequest."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"The body is a JSON object with tenant, alias, revision, tag, id: {error}.") from None
    for name, shape in _SHAPES.items():
        value = getattr(asked, name)
        if value is not None and not shape.fullmatch(value):
            raise InvalidRequest(f"`{name}` must match {shape.pattern}.", param=name)
    scope = Scope(asked.tenant, asked.alias, asked.revision, asked.tag)
    if scope == Scope():
        raise InvalidRequest("Say what has changed: tenant, alias, revision or tag, or several of them.")
    return scope, asked.id


def route(token: Secret | None, cache: Cache, telemetry: Telemetry) -> HTTPRouteHandler:
    @post("/admin/cache/invalidate", request_max_body_size=MAX_BODY_BYTES, status_code=200)
    async def invalidate(request: Request) -> Response[bytes]:
        if not is_admin(request.headers.get("authorization"), token):
            raise InvalidApiKey("The admin port wants `Authorization: Bearer <GATEWAY_ADMIN_TOKEN>`.")
        scope, id = read(await request.body())
        what = msgspec.to_builtins(scope)
        try:
            epoch = await cache.invalidate(scope, "administrator", id)
        except (RedisAway, RedisRefused) as error:
            raise CacheUnavailable(
                "Redis is away, so nothing was invalidated: send it again in a second.", retry_after_seconds=1.0
            ) from error
        telemetry.audit("administrator", "cache.invalidate", **what, id=epoch)
        return Response(msgspec.json.encode({"invalidated": what, "id": epoch}), media_type=MediaType.JSON)

    return invalidate
