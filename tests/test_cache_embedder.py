"""Texts as vectors by the local models: what they are like, and what becomes of one that is late, broken or missing."""

from __future__ import annotations

import asyncio
import threading
from array import array

import pytest

from app.cache.embedder import WAITING, WORDS, Embedder, EmbedderMissing, Embedders, local
from tests.redis_parts import run

ASKED = "My card was stolen, what do I do?"
AKIN, OTHER = "Somebody has stolen my card", "What does a transfer abroad cost?"


def cosine(one: bytes, other: bytes) -> float:
    return sum(a * b for a, b in zip(array("f", one), array("f", other), strict=True))


@pytest.mark.parametrize(("name", "dimensions"), [("static", 256), ("minilm", 384)])
def test_a_local_model_puts_what_means_the_same_together(name: str, dimensions: int) -> None:
    async def scenario() -> None:
        embedder = local(name)
        await embedder.load()
        asked, akin, other = [await embedder.embed(text, 30.0) for text in (ASKED, AKIN, OTHER)]
        assert len(asked) == 4 * dimensions
        assert cosine(asked, asked) == pytest.approx(1.0, abs=1e-3)
        assert cosine(asked, akin) > cosine(asked, other) + 0.2

    run(scenario())


@pytest.mark.parametrize("name", ["static", "minilm"])
def test_a_text_without_a_word_has_a_vector_too(name: str) -> None:
    embed = local(name).load_now()
    assert cosine(embed("\u200b"), embed("\u200b")) == pytest.approx(1.0, abs=1e-3)


def test_a_vector_is_of_its_text_alone_whatever_came_before() -> None:
    """Words of which the sums are kept, words beyond those that are kept, and words too long to be."""
    texts = [ASKED, AKIN, OTHER, "x" * 5_000, " ".join(f"{ASKED} {n}" for n in range(WORDS)), f"  {ASKED}\n", ""]
    warm = local("static").load_now()
    for n in range(WORDS):
        warm(f"order {n}")
    for text in [*texts, *texts]:
        assert cosine(warm(text), local("static").load_now()(text)) == pytest.approx(1.0, abs=1e-4)
    assert warm(f"  {ASKED}\n") == warm(ASKED)


def test_a_vector_that_is_late_is_none_and_no_more_than_so_many_wait() -> None:
    go = threading.Event()

    def stuck(text: str) -> bytes:
        go.wait(60)
        return b""

    async def scenario() -> None:
        embedder = Embedder("stuck", lambda: stuck, threaded=True)
        await embedder.load()
        assert await embedder.embed("a", 0.01) is None
        waiting = [asyncio.ensure_future(embedder.embed("b", 30.0)) for _ in range(WAITING - 1)]
        await asyncio.sleep(0)
        assert await embedder.embed("c", 30.0) is None
        assert embedder.late == 2
        go.set()
        assert await asyncio.gather(*waiting) == [b""] * (WAITING - 1)
        assert await embedder.embed("d", 30.0) == b""

    run(scenario())


def test_a_model_that_breaks_has_no_vector() -> None:
    def broken(text: str) -> bytes:
        raise ValueError("a tensor of another shape")

    async def scenario() -> None:
        embedder = Embedder("broken", lambda: broken, threaded=True)
        await embedder.load()
        assert await embedder.embed("a", 30.0) is None

    run(scenario())


def test_a_package_that_is_missing_is_named_and_leaves_no_vector() -> None:
    def missing() -> None:
        raise EmbedderMissing("pip install 'llm-gateway[static]' brings it")

    async def scenario() -> None:
        embedder = Embedder("missing", missing, threaded=False)
        assert await embedder.embed("a", 30.0) is None  # it is being loaded
        await embedder.load()
        assert await embedder.embed("a", 30.0) is None
        assert "llm-gateway[static]" in embedder.error

    run(scenario())


def test_another_name_is_an_alias_of_which_there_is_one_embedder() -> None:
    made: list[str] = []
    embedders = Embedders(lambda name, residency: made.append(name) or object())
    assert embedders.of("embed-small") is embedders.of("embed-small")
    assert made == ["embed-small"]
    assert embedders.of("static").name == "static"
