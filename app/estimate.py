"""What a call may need before anybody has counted: tokens by size, dollars by the dearest target of its chain."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from app.config import Alias
from app.core import Exchange, Usage, dearest, estimate
from app.prompt_size import BLOB_TOKENS, BYTES_PER_TOKEN, marks_cache, size

FEWEST_BYTES, MOST_BYTES = 1.5, 6.0
"""What is learned stays between these: dense code and numbers, and long English words with JSON around them."""
WEIGHT = 0.05
"""Of one call in what is learned: the last twenty or so decide."""
_MOST_SEEN = 2 * MOST_BYTES
"""One odd call does not teach more than many."""


class _Learned(Struct):
    """Of an alias's calls the mean, and how far they are from it on average.

    Of bytes of a request per token of input, and of the share of the input that the vendor read from its cache.
    Most calls have more bytes to a token than `bytes_per_token`, so most reservations are enough.
    """

    mean: float = BYTES_PER_TOKEN
    deviation: float = 0.0
    cached_mean: float = 0.0
    cached_deviation: float = 0.0
    bytes_per_token: float = BYTES_PER_TOKEN

    @property
    def cached(self) -> float:
        """Most calls have a larger share in the vendor's cache than this."""
        return max(0.0, self.cached_mean - self.cached_deviation)


class Estimates:
    """What each alias's requests have taught this process. Aliases are the configuration's, so it is bounded."""

    def __init__(self) -> None:
        self._learned: dict[str, _Learned] = {}

    def size(self, exchange: Exchange, alias: Alias) -> None:
        """Notes about how many tokens the call has: the request by its size, the answer by its limit."""
        request = exchange.request
        if request.units is not None:
            exchange.input_tokens_estimate, exchange.output_tokens_estimate = request.input_tokens, 0
            return
        exchange.sized = text_bytes, blobs = size(exchange.call.body)
        learned = self._learned.get(alias.name)
        bytes_per_token = BYTES_PER_TOKEN if learned is None else learned.bytes_per_token
        sized = int(text_bytes / bytes_per_token) + 1 + blobs * BLOB_TOKENS
        exchange.input_tokens_estimate = max(sized, request.input_tokens)
        output = alias.default_output_tokens if request.max_output_tokens is None else request.max_output_tokens
        exchange.output_tokens_estimate = output * request.choices

    def need(self, exchange: Exchange, alias: Alias) -> tuple[int, int]:
        """Tokens and nano-dollars to reserve, and notes the tokens where `size` has not.

        The client's hint can only raise the tokens. Dollars are by the dearest target, for the chain may end there.
        """
        if not exchange.input_tokens_estimate:
            self.size(exchange, alias)
        request = exchange.request
        usage = estimate(
            request.operation, exchange.input_tokens_estimate, exchange.output_tokens_estimate, request.units
        )
        plain = usage
        estimated = usage.input + usage.output + usage.embedding  # an estimate knows no other classes
        if usage.input:
            usage = self._split(usage, exchange.call.body, alias)
        tenant_id, at = exchange.tenant.id, exchange.call.received_at
        of_text = usage is plain and usage.input > 0  # what is not has no input, or was split
        expected = dearest(usage, alias.dear if of_text else alias.reach, tenant_id, at)
        if usage is plain:
            exchange.expected = expected
        nanos = expected.cost.total_nanos
        tokens = estimated if request.units is None else request.input_tokens
        if alias.cascade is not None:  # the doubtful answer is paid for too,
            nanos += dearest(usage, alias.cascade.targets, tenant_id, at).cost.total_nanos
            tokens += estimated
        if alias.hedge is not None:  # and so is the prompt of whoever is outrun
            prompt = replace(usage, output=0)
            nanos += dearest(prompt, alias.targets, tenant_id, at).cost.total_nanos
            tokens += prompt.total
        return max(tokens, exchange.call.tokens_hint), nanos

    def _split(self, usage: Usage, body: bytes, alias: Alias) -> Usage:
        """The prompt by what it may cost: read from the vendor's cache, or written there if the call asks for that."""
        learned = self._learned.get(alias.name)
        cached = int(usage.input * learned.cached) if learned is not None and learned.cached_mean else 0
        if marks_cache(body):
            rest = {"cache_write_1h" if b'"1h"' in body else "cache_write": usage.input - cached}
        elif cached:
            rest = {"input": usage.input - cached}
        else:
            return usage
        return Usage(cache_read=cached, output=usage.output, **rest)

    def learn(self, exchange: Exchange) -> None:
        """From a call that the vendor has counted, unless an image or a file was in it."""
        usage = exchange.usage
        if usage is None or not exchange.done or exchange.sized is None:
            return
        tokens = usage.total_input + usage.embedding
        text_bytes, blobs = exchange.sized
        if tokens <= 0 or blobs:
            return
        learned = self._learned.get(exchange.request.alias)
        if learned is None:
            learned = self._learned[exchange.request.alias] = _Learned()
        off = min(_MOST_SEEN, text_bytes / tokens) - learned.mean
        learned.deviation = deviation = learned.deviation + WEIGHT * (abs(off) - learned.deviation)
        learned.mean = mean = learned.mean + WEIGHT * off
        learned.bytes_per_token = min(MOST_BYTES, max(FEWEST_BYTES, mean - deviation))
        share = usage.cache_read / tokens
        if share or learned.cached_mean:
            learned.cached_deviation += WEIGHT * (abs(share - learned.cached_mean) - learned.cached_deviation)
            learned.cached_mean += WEIGHT * (share - learned.cached_mean)
