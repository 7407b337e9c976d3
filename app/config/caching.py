"""How answers are kept: an alias's cache, and what a tenant's policy says of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import msgspec

from app.config.reading import Faults
from app.config.running import CACHED, Alias, AliasCache, Target, TenantCache
from app.config.written import WrittenCache, WrittenTenantCache

MAX_TTL_SECONDS = 2_592_000.0
"""Thirty days: for so long it is remembered that something was invalidated."""
LOCAL_EMBEDDERS = ("static", "minilm")
"""Models that run in the replica; another name is that of an alias."""
MAX_TENANT_BYTES = 68_719_476_736
REVISION = re.compile(r"[\x20-\x7e]{1,128}")
"""A state of the knowledge that answers come from, as X-KB-Revision or an alias says."""


def alias_cache(written: WrittenCache, targets: tuple[Target, ...], path: str, faults: Faults) -> AliasCache | None:
    if not 1 <= written.ttl_seconds <= MAX_TTL_SECONDS:
        faults.add(f"{path}.ttl_seconds", f"must be from 1 to {MAX_TTL_SECONDS:.0f}, thirty days")
    if not 0 <= written.max_temperature <= 2:
        faults.add(f"{path}.max_temperature", "must be from 0 to 2")
    if written.kb_revision is not None and not REVISION.fullmatch(written.kb_revision):
        faults.add(f"{path}.kb_revision", f"must match {REVISION.pattern}")
    if written.mode not in ("off", "exact") and any(target.serves != "chat" for target in targets):
        faults.add(f"{path}.mode", "embeddings are kept by `exact` only: they have no questions that mean the same")
    if not 0 < written.threshold <= 1:
        faults.add(f"{path}.threshold", "must be above 0 and at most 1, a cosine")
    if not 1 <= written.max_turns <= 20:
        faults.add(f"{path}.max_turns", "must be from 1 to 20")
    if not 0 <= written.reverify_percent <= 100:
        faults.add(f"{path}.reverify_percent", "must be from 0 to 100")
    if not 0 <= written.judge_percent <= 100:
        faults.add(f"{path}.judge_percent", "must be from 0 to 100")
    if not 1 <= written.embedder_timeout_ms <= 10_000:
        faults.add(f"{path}.embedder_timeout_ms", "must be from 1 to 10000: every call that misses waits for it")
    if written.mode == "off":
        return None
    answers_by = [
        (target.name, target.model, target.provider.base_url, sorted(target.drop_params), target.max_output_tokens)
        for target in targets
    ]
    return AliasCache(
        mode=written.mode,
        ttl_seconds=float(written.ttl_seconds),
        max_temperature=float(written.max_temperature),
        kb_revision=written.kb_revision,
        answers_by=hashlib.sha256(msgspec.json.encode(answers_by)).digest(),
        embedder=written.embedder,
        threshold=float(written.threshold),
        max_turns=written.max_turns,
        reverify=written.reverify_percent / 100,
        embedder_seconds=written.embedder_timeout_ms / 1000,
        judge=written.judge,
        judge_share=written.judge_percent / 100,
    )


def check_helpers(aliases: Mapping[str, Alias], faults: Faults) -> None:
    """The aliases that caches name must be there: one of embeddings makes vectors, one of chats judges answers."""
    for alias in aliases.values():
        if alias.cache is None:
            continue
        named = [("judge", alias.cache.judge, "chat")] if alias.cache.judge is not None else []
        if alias.cache.embedder not in LOCAL_EMBEDDERS:
            named.append(("embedder", alias.cache.embedder, "embeddings"))
        for key, name, serves in named:
            path = f"aliases.{alias.name}.cache.{key}"
            if name not in aliases:
                known = f"{' and '.join(LOCAL_EMBEDDERS)} are local models; " if key == "embedder" else ""
                faults.add(path, f"no alias {name!r}; {known}aliases: {', '.join(sorted(aliases))}")
            elif aliases[name].serves != serves:
                faults.add(path, f"{name!r} serves {aliases[name].serves}; it must serve {serves}")
            elif key == "embedder" and len(models := _models(aliases[name])) > 1:
                said = "their vectors do not compare; name one model (priced_as says which one a deployment has)"
                faults.add(path, f"{name!r} has targets of {' and '.join(models)}: {said}")


def _models(alias: Alias) -> list[str]:
    """Of all its targets, as the price table calls them: at Azure a deployment has a name of its own.

    Some providers put the maker before a model's name: `openai/text-embedding-3-small`.
    """
    return sorted({(target.priced_as or target.model).rpartition("/")[2] for target in alias.reach})


def tenant_cache(
    written: WrittenTenantCache | None, plan: WrittenTenantCache | None, path: str, faults: Faults
) -> TenantCache:
    """The tenant's own words, then its plan's, then the defaults."""
    values = {}
    for name in ("mode", "store", "max_bytes"):
        said = [value for one in (written, plan) if one is not None and (value := getattr(one, name)) is not None]
        values[name] = said[0] if said else getattr(CACHED, name)
    if not 0 < values["max_bytes"] <= MAX_TENANT_BYTES:
        faults.add(f"{path}.max_bytes", f"must be above 0 and at most {MAX_TENANT_BYTES}; `mode: off` keeps nothing")
    wrong = next(
        (one.max_wrong_percent for one in (written, plan) if one is not None and one.max_wrong_percent is not None),
        CACHED.max_wrong * 100,
    )
    if not 0 < wrong <= 50:
        faults.add(f"{path}.max_wrong_percent", "must be above 0 and at most 50: percent of requests")
    return TenantCache(**values, max_wrong=wrong / 100)
