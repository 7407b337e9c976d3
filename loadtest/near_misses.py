"""Pairs of questions: near misses, which need another answer however alike they look, and harmless variations.

The words here are this file's own, not those that the guards look for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

PEOPLE = "Anna Peter Maria Ahmed Chloe Dmitri Yuki Fatima Lars Priya Olga Bruno".split()  # noqa: SIM905
PLACES = "Paris Oslo Lisbon Nairobi Toronto Kyoto Lima Dublin Athens Mumbai".split()  # noqa: SIM905
PRODUCTS = "Nimbus Quartz Falcon Aurora Pixelot Vantage Corona Helio".split()  # noqa: SIM905
AMOUNTS = (3, 7, 15, 20, 45, 120, 250, 999, 1500, 20000)
DATES = ("3 May", "12 June", "1 August", "2025-02-11", "2025-03-11", "next Friday", "Tuesday", "tomorrow", "today")
UNITS = (("kilometres", "miles"), ("kilograms", "pounds"), ("hours", "days"), ("weeks", "months"), ("MB", "GB"),
         ("celsius", "fahrenheit"), ("euros", "dollars"), ("litres", "gallons"))  # fmt: skip
OPPOSITES = (
    ("enable", "disable"), ("buy", "sell"), ("open", "close"), ("increase", "decrease"), ("lock", "unlock"),
    ("send", "receive"), ("add", "remove"), ("start", "stop"), ("accept", "reject"), ("upload", "download"),
    ("import", "export"), ("upgrade", "downgrade"), ("install", "uninstall"), ("mute", "unmute"),
    ("subscribe to", "unsubscribe from"), ("show", "hide"), ("activate", "deactivate"), ("freeze", "unfreeze"),
    ("connect", "disconnect"), ("encrypt", "decrypt"), ("approve", "deny"), ("borrow", "lend"), ("pause", "resume"),
    ("archive", "restore"), ("join", "leave"), ("expand", "collapse"),
)  # fmt: skip
THINGS = ("the account", "my subscription", "notifications", "the shared folder", "two-step login", "the report",
          "the camera", "my shares", "the backup", "the mailing list")  # fmt: skip
ASKED = ("How do I {} {}?", "Can you explain how to {} {}?", "What do I have to do to {} {}?", "I would like to {} {}.")
CLAIMS = (
    ("Is the parcel insured?", "Is the parcel not insured?"),
    ("Why does my printer start?", "Why doesn't my printer start?"),
    ("What happens if I accept the terms?", "What happens if I don't accept the terms?"),
    ("Which rooms have a balcony?", "Which rooms have no balcony?"),
    ("Can I travel with a visa?", "Can I travel without a visa?"),
    ("Tell me which files were saved", "Tell me which files were never saved"),
    ("Who is allowed to enter the lab?", "Who isn't allowed to enter the lab?"),
    ("Should I water the plant daily?", "Should I not water the plant daily?"),
)
ROLES = (
    ("Does {} owe {} money?", PEOPLE), ("How long is the flight from {} to {}?", PLACES),
    ("Did {} beat {} in the final?", PEOPLE), ("Move all files from {} to {}", PRODUCTS),
    ("Is {} older than {}?", PEOPLE), ("Convert the report from {} into {}", PRODUCTS),
    ("Is {} cheaper than {}?", PLACES), ("Can {} import from {}?", PRODUCTS),
)  # fmt: skip


def near_misses(seed: int, count: int) -> Iterator[tuple[str, str, str]]:
    """Kind, a question, and one that needs another answer."""
    draw = random.Random(seed)
    kinds = (_number, _amount, _date, _unit, _name, _name_in_lower_case, _code, _address, _negation, _opposite, _roles)
    for n in range(count):
        kind = kinds[n % len(kinds)]
        one, other = kind(draw)
        yield kind.__name__.strip("_").replace("_", " "), one, other


def _two(draw: random.Random, values: object) -> tuple[object, object]:
    one, other = draw.sample(list(values), 2)  # type: ignore[call-overload]
    return one, other


def _number(draw: random.Random) -> tuple[str, str]:
    text = draw.choice(("Book a table for {} people", "Give me {} ideas for a birthday", "What is {} factorial?",
                        "How do I print {} copies?", "Who won the cup {} years ago?"))  # fmt: skip
    one, other = _two(draw, AMOUNTS)
    return text.format(one), text.format(other)


def _amount(draw: random.Random) -> tuple[str, str]:
    text = draw.choice(("Can I send ${} abroad?", "Is {}€ a fair price for that?", "Refund £{} to my account",
                        "What interest do I get on {}%?"))  # fmt: skip
    one, other = _two(draw, AMOUNTS)
    return text.format(one), text.format(other)


def _date(draw: random.Random) -> tuple[str, str]:
    text = draw.choice(("Are you open on {}?", "Move my appointment to {}", "What is due {}?", "Show the orders of {}"))
    one, other = _two(draw, DATES)
    return text.format(one), text.format(other)


def _unit(draw: random.Random) -> tuple[str, str]:
    text = draw.choice(("What is the limit in {}?", "How much is 40 {}?", "Show the result in {}"))
    one, other = draw.choice(UNITS)
    return text.format(one), text.format(other)


def _name(draw: random.Random) -> tuple[str, str]:
    text, names = draw.choice((
        ("What is the phone number of {}?", PEOPLE), ("Send the contract to {} please", PEOPLE),
        ("What is the weather in {}?", PLACES), ("How long does shipping to {} take?", PLACES),
        ("Does {} have a warranty?", PRODUCTS), ("Where can I buy a {}?", PRODUCTS),
    ))  # fmt: skip
    one, other = _two(draw, names)
    return text.format(one), text.format(other)


def _name_in_lower_case(draw: random.Random) -> tuple[str, str]:
    one, other = _name(draw)
    return one.lower(), other.lower()


def _code(draw: random.Random) -> tuple[str, str]:
    text, shape = draw.choice((
        ("Where is order {}?", "AB-{}"), ("What does error E{} mean?", "{}"), ("Explain invoice {}", "INV-{}-7"),
        ("Is flight {} on time?", "LH{}"), ("When was version {} released?", "4.{}"),
    ))  # fmt: skip
    one, other = _two(draw, range(100, 990))
    return text.format(shape.format(one)), text.format(shape.format(other))


def _address(draw: random.Random) -> tuple[str, str]:
    text, shape = draw.choice((
        ("Forward it to {}", "{}@example.org"), ("Summarise {} for me", "https://example.org/{}"),
        ("Who owns {}?", "www.{}.example"),
    ))  # fmt: skip
    one, other = _two(draw, PEOPLE)
    return text.format(shape.format(str(one).lower())), text.format(shape.format(str(other).lower()))


def _negation(draw: random.Random) -> tuple[str, str]:
    return draw.choice(CLAIMS)


def _opposite(draw: random.Random) -> tuple[str, str]:
    text, thing = draw.choice(ASKED), draw.choice(THINGS)
    one, other = draw.choice(OPPOSITES)
    return text.format(one, thing), text.format(other, thing)


def _roles(draw: random.Random) -> tuple[str, str]:
    text, names = draw.choice(ROLES)
    one, other = _two(draw, names)
    return text.format(one, other), text.format(other, one)


def variations(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """A question, and the same in other clothes: what no guard should mind."""
    draw = random.Random(seed)
    for _ in range(count):
        question = draw.choice(list(near_misses(draw.randrange(1_000_000), 11)))[1]
        yield question, draw.choice(_CLOTHES)(question)


_CLOTHES = (
    lambda text: "Hello, " + text[0].lower() + text[1:] if text.split()[0] in _OPENERS else "Hello! " + text,
    lambda text: text.rstrip("?.") + ", please?",
    lambda text: text.rstrip("?."),
    lambda text: text.rstrip("?.") + "??",
    lambda text: "  " + text + " Thanks!",
    lambda text: "Hi there. " + text,
)
_OPENERS = frozenset("How Can What I Is Are Why Which Who Where When Does Did Should".split())  # noqa: SIM905
