"""`GET /status` on the main port: mode and health to anyone, everything else to who has the admin token."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Any
from xml.etree.ElementTree import Element

import msgspec
from litestar import MediaType, Request, Response, get
from litestar.handlers import HTTPRouteHandler

from app.admin import is_admin
from app.config import Secret
from app.reports.markup import document, el

LAG_SECONDS = 60.0
"""Rows that are older than this and not in PostgreSQL are late: the bound of the alert too."""
SHOWN_SECONDS = 10
"""How often a browser asks again."""
_MODES = {
    "normal": "Calls are served as usual.",
    "cache_only": "Only answers from the cache are served; no model is asked.",
    "read_only": "No calls are served. Models, usage and this page can be read.",
}
_HEALTH = {"ok": "Everything works", "degraded": "Something is wrong", "draining": "This replica stops"}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem; color: #202124 }
h1 { font-size: 1.2rem; margin: 0 0 1rem; font-weight: 500; color: #5f6368 }
.state { padding: 1rem 1.25rem; border-radius: 8px; border-left: 6px solid #137333; background: #e6f4ea; margin: 0 0 1.5rem }
.state.degraded, .state.draining { border-color: #b06000; background: #fef3e0 }
.state.incident { border-color: #b3261e; background: #fce8e6 }
.state strong { font-size: 1.35rem; display: block }
table { border-collapse: collapse; width: 100%; margin: 0 0 2rem }
th, td { text-align: left; vertical-align: top; padding: .45rem .75rem .45rem 0; border-bottom: 1px solid #dadce0; font-weight: 400 }
th { width: 11rem; color: #5f6368 } td { overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 0 .25rem } .bad { color: #b3261e } footer { color: #5f6368; font-size: .85rem }
@media (prefers-color-scheme: dark) {
  body { background: #202124; color: #e8eaed } th, h1, footer { color: #9aa0a6 } th, td { border-color: #3c4043 }
  .state { background: #14301d } .state.degraded, .state.draining { background: #3a2a10 } .state.incident { background: #3c1a18 }
  .bad { color: #f28b82 }
}
"""  # noqa: E501
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def route(token: Secret | None, status: Callable[[], dict[str, Any]]) -> HTTPRouteHandler:
    """The page as HTML for browsers, else as JSON. `status` is what a replica knows of itself."""

    @get("/status", sync_to_thread=False)
    def show(request: Request) -> Response[bytes]:
        whole = status()
        shown = public(whole)
        everything = whole if is_admin(request.headers.get("authorization"), token) else None
        headers = {"cache-control": "no-store", "vary": "accept, authorization", "x-content-type-options": "nosniff"}
        if "text/html" in request.headers.get("accept", ""):
            headers |= {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
            return Response(page(shown, everything), media_type=MediaType.HTML, headers=headers)
        body = msgspec.json.encode(shown | ({} if everything is None else {"details": everything}))
        return Response(body, media_type=MediaType.JSON, headers=headers)

    return show


def public(status: Mapping[str, Any]) -> dict[str, Any]:
    """What anyone may know: no name of a vendor, model, tenant or replica."""
    parts = {
        "calls": _calls(status),
        "models": _models(status["targets"]),
        "limits": "ok" if status["redis"] == "up" else "each replica counts for itself",
        "ledger": _ledger(status),
    }
    health = "draining" if status["draining"] else "ok" if set(parts.values()) == {"ok"} else "degraded"
    return {"health": health, "mode": status["mode"], "mode_until": status["mode_until"], "parts": parts}


def _calls(status: Mapping[str, Any]) -> str:
    if status["draining"]:
        return "this replica takes no more"
    return "the least urgent are refused" if status["overload"]["level"] > 0 else "ok"


def _models(targets: Mapping[str, str]) -> str:
    resting = sum(state != "ok" for state in targets.values())
    if not resting:
        return "ok"
    return "none can be asked" if resting == len(targets) else "some are replaced by others"


def _ledger(status: Mapping[str, Any]) -> str:
    if not status["spool"]["available"]:
        return "takes no rows, so no calls are served"
    late = status["postgres"] == "down" or (status["shipper"] or {}).get("lag_seconds", 0.0) > LAG_SECONDS
    return "usage is shown late" if late else "ok"


# --- HTML -------------------------------------------------------------------------------------------------------------


def page(shown: Mapping[str, Any], everything: Mapping[str, Any] | None) -> bytes:
    """One document, nothing loaded from anywhere; `everything` is for the administrator."""
    incident = shown["mode"] != "normal"
    title = f"Incident mode: {_word(shown['mode'])}" if incident else _HEALTH[shown["health"]]
    until = f" Until {shown['mode_until'][:16].replace('T', ' ')} UTC." if shown["mode_until"] else ""
    state = el(
        "div", el("strong", title), _MODES[shown["mode"]] + until,
        class_=f"state {'incident' if incident else shown['health']}", role="status",
    )  # fmt: skip
    parts = [_row(name.capitalize(), said, bad=said != "ok") for name, said in shown["parts"].items()]
    head = el(
        "head", el("meta", charset="utf-8"), el("title", f"LLM gateway: {title}"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="refresh", content=SHOWN_SECONDS), el("style", _STYLE),
    )  # fmt: skip
    body = el("body", el("h1", "LLM gateway"), state, el("table", el("tbody", *parts)), *_details(everything))
    return document(el("html", head, body, lang="en"))


def _details(everything: Mapping[str, Any] | None) -> list[Element]:
    if everything is None:
        return [el("footer", "As one replica sees it. With the admin token this page says more.")]
    rows = [_row(_word(name), _said(value), bad=False) for name, value in everything.items()]
    return [el("h2", f"Replica {everything['replica']}"), el("table", el("tbody", *rows))]


def _row(name: str, said: str, bad: bool) -> Element:
    return el("tr", el("th", name, scope="row"), el("td", said, class_="bad" if bad else None))


def _word(name: str) -> str:
    return name.replace("_", "-" if name.endswith("only") else " ")


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_said(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
