"""Questions with labels, made up: each label is one thing to do with one thing, asked for in many ways."""

from __future__ import annotations

import csv
import random
from pathlib import Path

_DEEDS = {
    "cancel": ("cancel", "call off", "get rid of"), "renew": ("renew", "prolong", "extend"),
    "find": ("find", "locate", "track down"), "pay": ("pay for", "settle the bill for", "transfer money for"),
    "share": ("share", "pass on", "let my family use"), "print": ("print", "get a paper copy of", "have printed"),
    "report": ("report a fault with", "complain about", "say that something is wrong with"),
    "change": ("change", "edit", "modify"), "insure": ("insure", "get cover for", "protect against damage to"),
}  # fmt: skip
_THINGS = {
    "ticket": ("train ticket", "rail booking"), "gym": ("gym membership", "fitness contract"),
    "parcel": ("parcel", "package"), "phone": ("mobile phone", "handset"), "flat": ("rented flat", "apartment"),
    "bike": ("bicycle", "bike"), "course": ("evening course", "language class"), "garden": ("allotment", "garden plot"),
}  # fmt: skip
_FRAMES = (
    "How do I {} my {}?", "I want to {} my {}", "Is there a way to {} a {}", "What are the steps to {} the {}?",
    "Could you help me {} my {} please", "I am trying to {} a {} and do not know how", "need to {} {} asap",
    "Where in the app can I {} my {}?", "My partner would like to {} our {}, what now?", "{} {} - how does that work?",
    "hello, can I {} the {} online?", "Whom do I ask if I have to {} a {}?",
)  # fmt: skip
_TAILS = (
    "",
    "",
    "",
    " Thanks!",
    " It is urgent.",
    " I looked everywhere.",
    " I am new here.",
    " Sorry for asking again.",
)


def made_up(count: int, seed: int = 1) -> list[tuple[str, str]]:
    """Texts and labels in random order; some texts come more than once."""
    draw = random.Random(seed)
    questions = []
    for _ in range(count):
        deed, thing = draw.choice(list(_DEEDS)), draw.choice(list(_THINGS))
        text = draw.choice(_FRAMES).format(draw.choice(_DEEDS[deed]), draw.choice(_THINGS[thing]))
        questions.append((text + draw.choice(_TAILS), f"{deed} {thing}"))
    return questions


def read(paths: list[Path], count: int, seed: int) -> list[tuple[str, str]]:
    """The questions of CSV files (`text,label` with any header), in an order that the seed tells."""
    questions = []
    for path in paths:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = csv.reader(lines)
            next(rows)
            questions += [(row[0].strip(), row[1].strip()) for row in rows if len(row) >= 2 and row[0].strip()]
    random.Random(seed).shuffle(questions)
    return questions[:count]
