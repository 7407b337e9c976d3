"""What two questions must have in common before one's answer may be the other's. Pure, and tens of microseconds.

Similarity does not see what turns an answer over: another number, a `not`, an opposite, a name, two roles exchanged.
So what a question says in such words is read once into `Facts`, and `differs` compares two of them. A guard may veto
where it should not (that costs a hit); what it lets through has still to be similar.
"""

from __future__ import annotations

import re

from msgspec import Struct

from app.cache.lexicon import (
    CURRENCIES,
    FUNCTION_WORDS,
    LANGUAGES,
    MONTHS,
    MULTIPLES,
    NEGATIONS,
    NUMBER_WORDS,
    OPPOSITES,
    RELATIVE_DAYS,
    REVERSING,
    ROLE_MARKERS,
    UNITS,
    WEEKDAYS,
)

LONGEST_TEXT = 2_000
"""Characters of a question that are read; one that is longer is not looked up, since a detail at its end counts too."""

_TOKEN = re.compile(
    r"(?P<link>https?://\S+|www\.\S+|[\w.+-]+@[\w-]+\.[\w.-]+)"
    r"|(?P<date>\d{4}-\d\d?-\d\d?|\d\d?[/.]\d\d?[/.]\d{2,4}|\d\d?:\d\d)"
    r"|(?P<number>\d+(?:[.,]\d+)*(?![^\W\d_]*[-_#]?\d))(?P<suffix>[^\W\d_]{1,12}(?![\w-]))?"
    r"|(?P<code>[^\W_]*(?:[-_#./][^\W_]+)*\d[\w#-]*)"
    r"|(?P<word>[^\W\d_]+(?:['\u2019][^\W\d_]+)?)"
    r"|(?P<sign>[$€£¥₹%])"
    r"|(?P<stop>[.!?:;]+(?=\s|$))"
)
_SCRIPTS = (
    ("ru", re.compile(r"[\u0400-\u04ff]")),
    ("el", re.compile(r"[\u0370-\u03ff]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("ar", re.compile(r"[\u0600-\u06ff]")),
    ("he", re.compile(r"[\u0590-\u05ff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("th", re.compile(r"[\u0e00-\u0e7f]")),
)
_SUFFIXES = ("ingly", "edly", "ings", "ing", "ied", "ies", "ed", "es", "s", "ly")


class Facts(Struct, frozen=True, array_like=True):
    """What a question says, as far as guards look: small enough to lie beside it in Redis, as `Written`."""

    words: tuple[str, ...]
    """Every word, stemmed, in order."""
    content: tuple[str, ...]
    """Those that are no function words."""
    numbers: tuple[str, ...] = ()
    """Numbers and dates in order: `500`, `2024-05-01`, `15:30`, `monday`, `tomorrow`."""
    units: tuple[str, ...] = ()
    """Units and currencies in order."""
    names: tuple[str, ...] = ()
    """Proper names, codes, e-mails and URLs in order, folded to lower case."""
    negations: int = 0
    language: str = ""
    """Two letters; empty where the text does not tell."""


class Written(Struct, frozen=True, array_like=True):
    """Facts as they lie in Redis. Words have no blanks, so each kind of them is one text: sixteen of these are read in
    a third of the time, and most are not looked at more closely.
    """

    words: str
    content: str
    numbers: str = ""
    units: str = ""
    names: str = ""
    negations: int = 0
    language: str = ""

    @property
    def facts(self) -> Facts:
        return Facts(
            tuple(self.words.split()),
            tuple(self.content.split()),
            tuple(self.numbers.split()),
            tuple(self.units.split()),
            tuple(self.names.split()),
            self.negations,
            self.language,
        )


def written(facts: Facts) -> Written:
    words = (" ".join(said) for said in (facts.words, facts.content, facts.numbers, facts.units, facts.names))
    return Written(*words, facts.negations, facts.language)


def stem(word: str) -> str:
    """An English word without its ending, so that `cards` and `card` are one. Crude: both sides are treated alike."""
    if word.endswith(("'s", "\u2019s")):
        word = word[:-2]
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            if suffix in ("ies", "ied"):
                return word[: -len(suffix)] + "y"
            base = word[: -len(suffix)]
            if suffix == "s" and base.endswith("s"):
                return word
            if len(base) > 3 and base[-1] == base[-2] and base[-1] not in "sz" and (base[-1] != "l" or len(base) > 5):
                base = base[:-1]
            return base.removesuffix("e") if len(base) > 3 else base
    return word.removesuffix("e") if len(word) > 4 else word


def read(text: str) -> Facts:
    """The facts of a question."""
    words: list[str] = []
    content: list[str] = []
    numbers: list[str] = []
    units: list[str] = []
    names: list[str] = []
    negations = capitals = 0
    fresh = True  # the next word begins a sentence, so that its capital says nothing
    shouted = text.isupper()
    tally: dict[str, int] = {}
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        token = match[0]
        if kind == "word":
            low = token.lower().replace("\u2019", "'")
            for language in LANGUAGES.get(low, ()):
                tally[language] = tally.get(language, 0) + 1
            word = stem(low)
            words.append(word)
            if low in FUNCTION_WORDS:
                fresh = False
                continue
            content.append(word)
            if low in NEGATIONS or low.endswith("n't"):
                negations += 1
            elif low in NUMBER_WORDS:
                numbers.append(NUMBER_WORDS[low])
            elif low in UNITS:
                units.append(UNITS[low])
            elif low in MONTHS and (low not in ("may", "march") or (token[0].isupper() and not fresh)):
                numbers.append(low[:3])
            elif low in WEEKDAYS or low in RELATIVE_DAYS:
                numbers.append(low)
            elif token[0].isupper() and not shouted:
                capitals += 1
                if not fresh or (len(token) > 1 and token.isupper()):
                    names.append(word)
            fresh = False
        elif kind == "stop":
            fresh = True
        elif kind == "sign":
            units.append(CURRENCIES.get(token, "percent"))
        elif kind in ("link", "code"):
            name = token.lower().rstrip(".,;:!?)/-")
            names.append(name)
            words.append(name)
            content.append(name)
            fresh = False
        else:
            suffix = (match["suffix"] or "").lower()
            value = token if kind == "date" else _number(match["number"], suffix)
            if suffix and suffix not in UNITS and suffix not in MULTIPLES:
                value += suffix
            numbers.append(value)
            words.append(value)
            content.append(value)
            if suffix in UNITS:
                units.append(UNITS[suffix])
                words.append(stem(suffix))
            fresh = False
    language = _language(text, tally)
    if language == "de" or (capitals > 3 and capitals * 2 > len(content)):  # nouns, a Title In Capitals: no names
        names = [name for name in names if not name.isalpha()]
    return Facts(
        tuple(words),
        tuple(content),
        tuple(numbers),
        tuple(units),
        tuple(names),
        negations,
        language,
    )


def _number(written: str, suffix: str) -> str:
    """`1,000.50`, `1.000,50` and `1000.5` are one number; so are `5k` and `5000`."""
    if "," in written or "." in written:
        head, mark, tail = written.rpartition("," if written.rfind(",") > written.rfind(".") else ".")
        if len(tail) == 3 and (mark == "," or written.count(mark) > 1):
            head, tail = head + tail, ""
        written = re.sub(r"[.,]", "", head) + ("." + tail if tail else "")
    value = float(written) * MULTIPLES.get(suffix, 1)
    return f"{value:.10g}" if value < 1e10 else written


def _language(text: str, tally: dict[str, int]) -> str:
    if not text.isascii():
        for language, script in _SCRIPTS:
            if script.search(text):
                return language
    if not tally:
        return ""
    ranked = sorted(tally.items(), key=lambda item: -item[1])
    if ranked[0][1] < 2 or (len(ranked) > 1 and ranked[1][1] == ranked[0][1]):
        return ""
    return ranked[0][0]


# --- comparing --------------------------------------------------------------------------------------------------------


def differs(one: Facts, other: Facts) -> str | None:
    """The guard that keeps the two questions apart; None where none does."""
    if one.language and other.language and one.language != other.language:
        return "language"
    if (one.negations ^ other.negations) & 1:
        return "negation"
    if one.numbers != other.numbers and sorted(one.numbers) != sorted(other.numbers):
        return "numbers"
    if one.units != other.units and one.units and other.units:
        shared = set(one.units)
        if shared != set(other.units) or _order(one.units, shared) != _order(other.units, shared):
            return "units"
    if one.words == other.words:
        return None
    here, there = frozenset(one.words), frozenset(other.words)
    if one.names or other.names:
        if not there.issuperset(one.names) or not here.issuperset(other.names):
            return "names"
        shared = set(one.names) & set(other.names)
        if len(shared) > 1 and _order(one.names, shared) != _order(other.names, shared):
            return "names"
    if _opposed(here - there, there - here):
        return "opposites"
    if _reversed(one, other):
        return "roles"
    return None


def _order(names: tuple[str, ...], shared: set[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name in shared]


def _opposed(only_here: frozenset[str], only_there: frozenset[str]) -> bool:
    for word in only_here:
        against = _STEMMED.get(word)
        if against is not None and not against.isdisjoint(only_there):
            return True
    return any(
        _prefixed(word, only_there) for word in only_here if len(word) > 4 and word.startswith(REVERSING)
    ) or any(_prefixed(word, only_here) for word in only_there if len(word) > 4 and word.startswith(REVERSING))


def _prefixed(word: str, others: frozenset[str]) -> bool:
    return any(word.startswith(prefix) and word[len(prefix) :] in others for prefix in REVERSING)


def _reversed(one: Facts, other: Facts) -> bool:
    """Whether the same words have changed places: `from A to B` and `from B to A`, `A pays B` and `B pays A`."""
    mine, theirs = one.content, other.content
    if len(mine) != len(theirs) or len(mine) < 2 or mine == theirs or sorted(mine) != sorted(theirs):
        return False
    places = [place for place, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    if len(mine) == 2 or len(places) != 2:
        return _marked(one.words) != _marked(other.words)
    return True


def _marked(words: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """Each marker with the noun after it."""
    found = []
    marker = ""
    for word in words:
        if word in ROLE_MARKERS:
            marker = word
        elif marker and word not in FUNCTION_WORDS:
            found.append((marker, word))
            marker = ""
    return frozenset(found)


def substituted(one: Facts, other: Facts) -> tuple[str, str] | None:
    """The pair of words in which two questions differ, where they are the same but for one: `send it to Anna`, `… Ben`.

    Such a pair is more often another question than another wording, unless the words look alike (typing errors).
    """
    mine, theirs = one.content, other.content
    if len(mine) != len(theirs) or len(mine) < 2:
        return None
    pair = None
    for a, b in zip(mine, theirs, strict=True):
        if a != b:
            if pair is not None:
                return None
            pair = (a, b)
    if pair is None or _alike(*pair):
        return None
    return pair


def _alike(a: str, b: str) -> bool:
    """Whether one is the other with a letter wrong, or with another ending."""
    if min(len(a), len(b)) < 4 or abs(len(a) - len(b)) > 3:
        return False
    start = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        start += 1
    if start >= max(4, max(len(a), len(b)) - 4) and start >= min(len(a), len(b)) - 1:
        return True
    end = 0
    for x, y in zip(reversed(a[start:]), reversed(b[start:]), strict=False):
        if x != y:
            break
        end += 1
    return max(len(a), len(b)) - start - end <= (2 if sorted(a) == sorted(b) else 1)


_STEMMED: dict[str, frozenset[str]] = {}
for _word, _others in OPPOSITES.items():
    _STEMMED[stem(_word)] = _STEMMED.get(stem(_word), frozenset()) | {stem(other) for other in _others}
