"""Secrets and personal data out of text: each find becomes the name of its kind in brackets. Pure.

Where in doubt something is taken for a secret: what is lost is a word of a log, what would be kept is a card number.
Names and addresses of people are not found; who must not keep those must not keep content. With the extra `redaction`
phone numbers are also found in the national forms of the regions that are named (libphonenumber).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

MAX_BLOB = 512
"""A string so long without a space is no text: an image, a file, an embedding in base64. It is not kept."""

_BEFORE = r"(?<![A-Za-z0-9])"
_TOKENS = (
    # https://docs.github.com/en/code-security/secret-scanning, and vendors' own pages: how each writes its keys.
    r"sk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic, DeepSeek, OpenRouter, our own
    r"[rps]k_(?:live|test)_[A-Za-z0-9]{10,}",  # Stripe
    r"(?:AKIA|ASIA|ABIA|ACCA|AROA|AIDA)[A-Z0-9]{16}",  # AWS
    r"AIza[A-Za-z0-9_-]{30,}",  # Google
    r"ya29\.[A-Za-z0-9_-]{20,}",
    r"gh[opsur]_[A-Za-z0-9]{20,}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{20,}",
    r"glpat-[A-Za-z0-9_-]{16,}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"hf_[A-Za-z0-9]{20,}",  # Hugging Face
    r"(?:gsk|xai|pplx|csk|npm|dop_v1|shpat|SG)[_.-][A-Za-z0-9_.-]{20,}",
    r"eyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.?[A-Za-z0-9_-]*",  # JWT
)
_MAIL = r"[^\s<>()\[\]{},;:\"'@]"
_LABEL = r"[^\s<>()\[\]{},;:\"'@./]"
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)),
    ("key", re.compile(_BEFORE + "(?:" + "|".join(_TOKENS) + ")")),
    ("key", re.compile(r"https://hooks\.slack\.com/services/[A-Za-z0-9/_-]+")),
    ("key", re.compile(r"(?<=://)[^\s/:@]{0,128}:[^\s/@]{1,512}(?=@)")),  # a URL's user and password
    ("key", re.compile(r"(?i)(?<=\bbearer )[A-Za-z0-9._~+/=-]{8,}")),
    ("email", re.compile(rf"{_MAIL}{{1,128}}@{_LABEL}{{1,63}}(?:\.{_LABEL}{{1,63}}){{1,8}}")),
)
_ASSIGNED = re.compile(
    r"(?i)((?:api|access|secret|private|auth)[_ -]?(?:key|token)|secret|passw(?:or)?d|passphrase|token|pwd)"
    r"([\"'`]?\s*(?:[:=]>?|\bis\b)\s*[\"'`]?)([^\s\"'`,;]{4,})"
)
"""`password: …`, `API_KEY=…`: the value goes, its name stays."""
_IBAN_START = re.compile(r"(?:(?<![A-Za-z0-9])|(?<=IBAN)|(?<=iban))[A-Za-z]{2}[ .-]?\d[ .-]?\d")
_IBAN_LENGTHS = {
    word[:2]: int(word[2:])
    for word in re.findall(
        r"\w{4}",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
        "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
        "YE30",
    )
}
"""Signs of an IBAN by its country (ISO 13616, SWIFT's registry)."""
_DIGITS = re.compile(r"\d(?:[\s.\-\u2010-\u2014/]{0,3}\d){11,}")
_CARD_LENGTHS = range(12, 20)  # ISO/IEC 7812
_PHONE = re.compile(
    r"(?:\+|(?<![\w.])00)[ ]?\d(?:[\s()./-]{0,3}\d){6,14}(?!\d)"  # international
    r"|(?<![\w.])(?:"
    r"\(\d{2,5}\)[ ]?\d(?:[ ./-]?\d){4,10}"  # (030) 1234567
    r"|\d{3}[ .-]\d{3}[ .-]\d{4}"  # 555-123-4567
    r"|0\d{1,4}[ ./-]\d(?:[ ./-]?\d){4,9}"  # 0171/1234567
    r"|0\d{8,11}"
    r")(?!\d)"
)

Tally = Counter[str]


def redact(text: str, found: Tally, regions: Sequence[str] = ()) -> str:
    """The text without what it should not hold; counts by kind in `found`. `regions` are ISO 3166 country codes."""
    for kind, pattern in _PATTERNS:
        text = _replaced(text, pattern, kind, found)
    text = _ASSIGNED.sub(lambda match: _assigned(match, found), text)
    text = _cut(text, _ibans(text), "iban", found)
    text = _cut(text, _cards(text), "card", found)
    text = _replaced(text, _PHONE, "phone", found)
    if regions and (matches := _matcher()) is not None:
        for region in regions:
            text = _cut(text, [(match.start, match.end) for match in matches(text, region)], "phone", found)
    return text


def redact_json(value: object, found: Tally, regions: Sequence[str] = ()) -> object:
    """The same for every string of a decoded JSON value, keys included; what is no text is left out.

    A string that holds JSON itself, as a tool's arguments do, is read as such: there a secret may be escaped.
    """
    if isinstance(value, str):
        if value.startswith("data:") or (len(value) > MAX_BLOB and not re.search(r"\s", value)):
            found["blob"] += 1
            return "[blob]"
        if value[:1] in ("{", "["):
            try:
                return msgspec.json.encode(redact_json(msgspec.json.decode(value), found, regions)).decode()
            except (msgspec.DecodeError, RecursionError):
                return redact(value, found, regions)
        return redact(value, found, regions)
    if isinstance(value, dict):
        return {
            redact(key, found, regions): _member(key, member, found, regions)
            for key, member in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [redact_json(member, found, regions) for member in value]
    if isinstance(value, int | float) and not isinstance(value, bool) and len(str(value)) >= _CARD_LENGTHS[0]:
        return redact(str(value), found, regions)
    return value


_SECRET_NAME = re.compile(
    r"(?i)(?:(?:api|access|secret|private|auth)[_ -]?(?:key|token)|secret|passw(?:or)?d|passphrase|^token$|^pwd$)"
)


def _member(name: str, value: object, found: Tally, regions: Sequence[str]) -> object:
    """A member that is called a secret is one, whatever it looks like."""
    if isinstance(value, str | int) and not isinstance(value, bool) and _SECRET_NAME.search(name):
        found["key"] += 1
        return "[key]"
    return redact_json(value, found, regions)


def _replaced(text: str, pattern: re.Pattern[str], kind: str, found: Tally) -> str:
    text, count = pattern.subn(f"[{kind}]", text)
    if count:
        found[kind] += count
    return text


def _assigned(match: re.Match[str], found: Tally) -> str:
    if match[3].startswith(("[key", "[private", "[email", "[blob")):
        return match[0]
    found["key"] += 1
    return f"{match[1]}{match[2]}[key]"


def _cut(text: str, spans: Sequence[tuple[int, int]], kind: str, found: Tally) -> str:
    """Without these spans, which are in order; of spans that overlap the union goes."""
    out, at = [], 0
    for start, end in sorted(spans):
        if end <= at:
            continue
        if start >= at:
            out += [text[at:start], f"[{kind}]"]
            found[kind] += 1
        at = end
    return "".join([*out, text[at:]])


def _cards(text: str) -> list[tuple[int, int]]:
    """Where digits pass Luhn's check, at any place of a longer row: a number may stand before or behind a card's."""
    spans = []
    for run in _DIGITS.finditer(text):
        places = [place for place in range(run.start(), run.end()) if text[place].isdigit()]
        digits = [int(text[place]) for place in places]
        for first in range(len(digits) - _CARD_LENGTHS[0] + 1):
            for length in _CARD_LENGTHS:
                last = first + length
                if last > len(digits):
                    break
                bounded = _ends(places, first) and _ends(places, last)
                if bounded and digits[first] in (2, 3, 4, 5, 6) and _luhn(digits[first:last]):
                    spans.append((places[first], places[last - 1] + 1))
    return spans


def _ends(places: list[int], place: int) -> bool:
    """Whether a number may begin at this digit, or end before it: where digits do not touch."""
    return place in (0, len(places)) or places[place] - places[place - 1] > 1


def _luhn(digits: list[int]) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        doubled = digit * 2 if place % 2 else digit
        total += doubled - 9 if doubled > 9 else doubled
    return total % 10 == 0


def _ibans(text: str) -> list[tuple[int, int]]:
    """Where letters and digits, as many as their country has, pass ISO 7064's check."""
    spans = []
    for start in _IBAN_START.finditer(text):
        wanted = _IBAN_LENGTHS.get(text[start.start() : start.start() + 2].upper(), 0)
        signs, place = "", start.start()
        while place < len(text) and len(signs) < wanted:
            sign = text[place]
            if sign.isascii() and sign.isalnum():
                signs += sign
            elif sign not in " .-\u00a0":
                break
            place += 1
        if wanted and len(signs) == wanted and _mod97(signs):
            spans.append((start.start(), place))
    return spans


def _mod97(iban: str) -> bool:
    return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97 == 1


def _matcher() -> Callable[[str, str], Iterator[object]] | None:
    """libphonenumber's, where the extra is installed."""
    try:
        import phonenumbers
    except ImportError:
        return None
    return phonenumbers.PhoneNumberMatcher
