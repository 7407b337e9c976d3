"""The ledger against a vendor's invoice: what differs, and why. Pure: lines of both in, differences out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from fractions import Fraction
from typing import Literal

from msgspec import Struct

from app.reports.invoices import InvoiceLine

Cause = Literal["missing_here", "missing_there", "tokens", "price"]
CAUSES: Mapping[Cause, str] = {
    "missing_here": "on the invoice, not in the ledger",
    "missing_there": "in the ledger, not on the invoice",
    "tokens": "other token counts",
    "price": "same tokens, other price",
}
ALARM_RATIO = 0.05
"""Drift above 5 % asks for an investigation."""
_ROUNDING_NANOS = 1_000
_ROUNDING_SHARE = 10_000
"""Vendors round: a cost that differs by a millionth of a dollar, or by a ten-thousandth of itself, is the same."""


class LedgerLine(Struct, frozen=True, kw_only=True):
    """A call of the ledger, or a day's calls of one model at one provider. `key` is the provider's name here."""

    day: date
    model: str
    key: str
    request_id: str | None = None
    requests: int = 1
    input_tokens: int
    output_tokens: int
    input_nanos: int
    output_nanos: int


class Difference(Struct, frozen=True, kw_only=True):
    """`nanos` is what the invoice has more than the ledger; tokens and requests likewise."""

    cause: Cause
    day: date
    model: str
    key: str | None
    request_id: str | None
    nanos: int
    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0


class Drift(Struct, frozen=True, kw_only=True):
    """Everything that differs, the largest first. `priced` is False for an invoice without amounts: its tokens are then
    worth what the ledger says."""

    differences: tuple[Difference, ...]
    ledger_nanos: int
    invoice_nanos: int
    matched: int
    priced: bool

    @property
    def gross_nanos(self) -> int:
        """What differs, whichever way: an error too high does not make up for one too low."""
        return sum(abs(each.nanos) for each in self.differences)

    @property
    def ratio(self) -> float:
        """Gross drift as a share of the larger of both sums."""
        whole = max(self.ledger_nanos, self.invoice_nanos)
        return self.gross_nanos / whole if whole else 0.0

    def by_cause(self) -> dict[Cause, tuple[int, int]]:
        """For each cause how many differences, and their sum in nano-dollars."""
        return {
            cause: (
                sum(each.cause == cause for each in self.differences),
                sum(each.nanos for each in self.differences if each.cause == cause),
            )
            for cause in CAUSES
        }


class _Sums(Struct, frozen=True):
    """A group of lines of one side; None where none of them says."""

    requests: int | None
    input_tokens: int | None
    output_tokens: int | None
    cost: int | None
    input_nanos: int = 0
    output_nanos: int = 0


_Place = tuple[date, str, str | None, str | None]
"""Day, model, key, request id."""


def reconcile(
    ours: Iterable[LedgerLine],
    theirs: Iterable[InvoiceLine],
    models: Mapping[str, str] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Drift:
    """Matches lines with a request id by it, and all others by day, model and key.

    `models` and `keys` translate the invoice's names to the ledger's. Where any line of the invoice names no key, or
    one that `keys` does not know, keys are not told apart. Where the invoice counts calls, a group whose number of
    calls differs lacks calls; otherwise it differs in tokens.
    """
    models, keys = models or {}, keys or {}
    theirs = list(theirs)
    by_key = bool(theirs) and all(line.key in keys for line in theirs)
    by_id = any(line.request_id is not None for line in theirs)
    called: dict[_Place, tuple[date, str]] = {}
    own = _ledger_sums(ours, by_key, by_id, called)
    said = _invoice_sums(theirs, models, keys if by_key else {}, called)
    spent = sum(sums.cost or 0 for sums in own.values())
    tokens = sum((sums.input_tokens or 0) + (sums.output_tokens or 0) for sums in own.values())
    usual = Fraction(spent, tokens) if tokens else Fraction(0)
    differences: list[Difference] = []
    for place in own.keys() | said.keys():
        differences += _compare(place, called[place], own.get(place), said.get(place), usual)
    return Drift(
        differences=tuple(sorted(differences, key=lambda each: (-abs(each.nanos), each.day, each.model, str(each)))),
        ledger_nanos=spent,
        invoice_nanos=sum(sums.cost or 0 for sums in said.values()),
        matched=len(own.keys() & said.keys()),
        priced=any(sums.cost is not None for sums in said.values()),
    )


def _ledger_sums(
    lines: Iterable[LedgerLine], by_key: bool, by_id: bool, called: dict[_Place, tuple[date, str]]
) -> dict[_Place, _Sums]:
    groups: dict[_Place, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for line in lines:
        place = _place(line.day, line.model, line.key if by_key else None, line.request_id if by_id else None)
        called.setdefault(place, (line.day, line.model))
        values = (line.requests, line.input_tokens, line.output_tokens, line.input_nanos, line.output_nanos)
        groups[place] = [sum(pair) for pair in zip(groups[place], values, strict=True)]
    return {
        place: _Sums(requests, read, written, read_nanos + written_nanos, read_nanos, written_nanos)
        for place, (requests, read, written, read_nanos, written_nanos) in groups.items()
    }


def _invoice_sums(
    lines: Iterable[InvoiceLine],
    models: Mapping[str, str],
    keys: Mapping[str, str],
    called: dict[_Place, tuple[date, str]],
) -> dict[_Place, _Sums]:
    groups: dict[_Place, list[InvoiceLine]] = defaultdict(list)
    for line in lines:
        key = keys.get(line.key) if line.key is not None else None
        model = models.get(line.model, line.model)
        place = _place(line.day, model, key, line.request_id)
        called.setdefault(place, (line.day, model))
        groups[place].append(line)
    found = {}
    for place, group in groups.items():
        sums = _Sums(
            _sum(line.requests for line in group),
            _sum(line.input_tokens for line in group),
            _sum(line.output_tokens for line in group),
            _sum(line.cost_nanos for line in group),
        )
        if any((sums.requests, sums.input_tokens, sums.output_tokens, sums.cost)):
            found[place] = sums
    return found


def _place(day: date, model: str, key: str | None, request_id: str | None) -> _Place:
    """A call with an id is found by it alone: the vendor may count it on the next day, or under another name."""
    return (date.min, "", None, request_id) if request_id is not None else (day, model, key, None)


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _compare(
    place: _Place, called: tuple[date, str], own: _Sums | None, said: _Sums | None, usual: Fraction
) -> list[Difference]:
    day, model = called
    _, _, key, request_id = place

    def difference(cause: Cause, nanos: int, read: int = 0, written: int = 0, requests: int = 0) -> Difference:
        return Difference(
            cause=cause, day=day, model=model, key=key, request_id=request_id, nanos=nanos,
            input_tokens=read, output_tokens=written, requests=requests,
        )  # fmt: skip

    if own is None:
        assert said is not None
        tokens = (said.input_tokens or 0, said.output_tokens or 0)
        worth = round(sum(tokens) * usual) if said.cost is None else said.cost
        return [difference("missing_here", worth, *tokens, said.requests or 0)]
    if said is None:
        read, written, requests = own.input_tokens or 0, own.output_tokens or 0, own.requests or 0
        if not (read or written or own.cost):
            return []  # a call that the vendor had no reason to bill
        return [difference("missing_there", -(own.cost or 0), -read, -written, -requests)]
    found = []
    read = 0 if said.input_tokens is None else said.input_tokens - (own.input_tokens or 0)
    written = 0 if said.output_tokens is None else said.output_tokens - (own.output_tokens or 0)
    requests = 0 if said.requests is None else said.requests - (own.requests or 0)
    worth = round(read * _unit(own, said, "input") + written * _unit(own, said, "output"))
    if requests or read or written:
        cause: Cause = "missing_here" if requests > 0 else "missing_there" if requests < 0 else "tokens"
        found.append(difference(cause, worth, read, written, requests))
    if said.cost is not None:
        rest = said.cost - (own.cost or 0) - worth
        if abs(rest) > max(_ROUNDING_NANOS, max(said.cost, own.cost or 0) // _ROUNDING_SHARE):
            found.append(difference("price", rest))
    return found


def _unit(own: _Sums, said: _Sums, side: Literal["input", "output"]) -> Fraction:
    """Nano-dollars a token: what the ledger paid here, or where it has none of this kind what the invoice did."""
    tokens, nanos = (own.input_tokens, own.input_nanos) if side == "input" else (own.output_tokens, own.output_nanos)
    if tokens:
        return Fraction(nanos, tokens)
    whole = (said.input_tokens or 0) + (said.output_tokens or 0)
    return Fraction(said.cost or 0, whole) if whole else Fraction(0)


def span(lines: Sequence[InvoiceLine]) -> tuple[date, date]:
    """The first and last day of an invoice that has lines."""
    days = [line.day for line in lines]
    return min(days), max(days)
