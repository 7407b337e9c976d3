"""What the semantic cache keeps in a replica's memory: by use, within bytes that are true."""

from __future__ import annotations

import gc
import random
import sys
from types import FunctionType, ModuleType

import numpy
import pytest

from app.cache.bounded import Bounded
from app.cache.judge import LATELY, Judge, answer


def taken(one: object) -> int:
    """Bytes of an object and of all that it alone refers to."""
    seen: dict[int, object] = {}
    waiting = [one]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen and not isinstance(found, type | ModuleType | FunctionType):
            seen[id(found)] = found
            waiting += gc.get_referents(found)
            if isinstance(found, numpy.ndarray):  # which does not tell
                waiting.append(found.base)
    return sum(sys.getsizeof(found) for found in seen.values())


def said(chance: random.Random, characters: int, letters: str = "abcdefghijklmnop") -> str:
    """Words that hardly ever come twice."""
    words = ("".join(chance.choices(letters, k=chance.randint(2, 10))) for _ in range(characters))
    return " ".join(words)[:characters]


def vector(chance: random.Random) -> bytes:
    return b"".join(chance.randbytes(2) + b"\x00\x3d" for _ in range(256))


@pytest.mark.parametrize("characters", [1, 100, 600, 2_000])
@pytest.mark.parametrize("letters", ["abcdefghijkl", "\u0430\u0431\u0432\u0433\u0434\u0435\u0436"])
def test_an_answer_takes_no_more_than_it_says_and_a_fraction_of_its_words(characters: int, letters: str) -> None:
    chance = random.Random(1)
    text = said(chance, characters, letters)
    kept = answer(text, vector(chance))
    assert taken(kept) <= kept.size <= 1.6 * taken(kept)
    assert kept.size < 10_000
    if characters == 2_000:
        assert taken(kept.facts) > 2 * kept.size


def test_a_judge_takes_no_more_than_it_says_however_much_it_has_heard() -> None:
    chance = random.Random(2)
    judge = Judge()
    for heard in range(LATELY + 50):
        judge.hear(answer(said(chance, 2_000), vector(chance)))
        if heard % 50 == 49:
            assert taken(judge) <= judge.size < 400_000


def test_what_all_answers_say_is_known_also_when_the_older_ones_count_half() -> None:
    chance = random.Random(3)
    judge = Judge()
    for heard in range(3 * LATELY):
        judge.hear(answer(f"Harbor of {'really ' * (heard % 3 == 0)}{said(chance, 50)}", vector(chance)))
    (often,) = (word for word in judge._words if judge._words[word] > judge._counted / 2)
    assert often == "harbor"
    assert judge._words["harbor"] == judge._counted


def test_what_is_longest_unused_goes_first_and_what_grows_is_counted_anew() -> None:
    kept: Bounded[str] = Bounded(10)
    for name in "abc":
        kept.put(name, name.upper(), 3)
    assert kept.get("a") == "A"
    kept.put("d", "D", 3)
    assert [kept.get(name) for name in "abcd"] == ["A", None, "C", "D"]
    kept.put("c", "C!", 6)
    assert (kept.get("a"), kept.get("c"), kept.get("d"), kept.bytes) == (None, "C!", "D", 9)
    kept.put("e", "E", 50)
    assert (len(kept), kept.get("e"), kept.bytes) == (1, "E", 50)
