"""What Gemini answers, whole or streamed, as chat completions.

Sources: Gemini API reference (GenerateContentResponse, FinishReason, UsageMetadata), Vertex AI reference, recorded
answers. A whole answer is read as a stream of one event, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
from msgspec import Raw

from app.core import Usage
from app.errors import VendorBroke, VendorFailed
from app.providers import chat_shape
from app.providers.chat_shape import WrittenChoice, WrittenMessage, WrittenToolCall
from app.providers.gemini.errors import error_in_answer
from app.providers.gemini.request import SIGNATURE_FORMAT
from app.providers.gemini.wire import (
    Blob,
    Candidate,
    FunctionCall,
    GenerateContentResponse,
    LogprobsCandidate,
    LogprobsResult,
    ModalityTokens,
    Part,
    PromptFeedback,
    UsageMetadata,
)
from app.providers.openai import MAX_TOKENS, text_bytes
from app.providers.translator import Answer, Frame, Kind, Stamp, StreamReader, split
from app.sse import DONE, FrameSplitter, data_of

_answer = msgspec.json.Decoder(GenerateContentResponse)
_encode = msgspec.json.encode
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_NOTHING = (b"", b"null", b"{}")
UNSET = msgspec.UNSET

FINISHED = {"STOP": "stop", "MAX_TOKENS": "length"}
BLOCKED = frozenset(
    {
        "SAFETY",
        "RECITATION",
        "LANGUAGE",
        "BLOCKLIST",
        "PROHIBITED_CONTENT",
        "SPII",
        "MODEL_ARMOR",
        "IMAGE_SAFETY",
        "IMAGE_PROHIBITED_CONTENT",
        "IMAGE_RECITATION",
    }
)
"""The vendor's filters: `content_filter`, and a refusal that says which."""
MAX_CHOICES = 128
"""OpenAI's bound of `n`."""
MISFIRED = frozenset(
    {
        "MALFORMED_FUNCTION_CALL",
        "UNEXPECTED_TOOL_CALL",
        "TOO_MANY_TOOL_CALLS",
        "MALFORMED_RESPONSE",
        "MISSING_THOUGHT_SIGNATURE",
    }
)
"""The model wrote what the vendor could not read, and the vendor left it out: no answer, but worth another try."""


# --- usage ------------------------------------------------------------------------------------------------------------


def usage_of(usage: UsageMetadata | None) -> Usage | None:
    """Disjoint classes; they sum to the vendor's total.

    Cached tokens are inside the prompt's count; tool-use prompts and thoughts stand beside prompt and answer. Where
    the total says that thoughts are inside the answer's count, or that there were more than the parts tell, so it is.
    """
    if usage is None or (usage.prompt_token_count is None and usage.total_token_count is None):
        return None
    prompt, cached = usage.prompt_token_count or 0, usage.cached_content_token_count or 0
    tool, answer = usage.tool_use_prompt_token_count or 0, usage.candidates_token_count or 0
    thoughts, total = usage.thoughts_token_count or 0, usage.total_token_count or 0
    if not all(0 <= tokens <= MAX_TOKENS for tokens in (prompt, cached, tool, answer, thoughts, total)):
        return None
    given = prompt + tool
    if thoughts and total == given + answer:
        thoughts = min(thoughts, answer)
        answer -= thoughts
    unexplained = max(0, total - given - answer - thoughts)
    asked, kept = usage.prompt_tokens_details, usage.cache_tokens_details
    used = usage.tool_use_prompt_tokens_details
    cached = min(cached, given)
    left = given - cached
    audio = min(max(0, _of("AUDIO", asked) + _of("AUDIO", used) - _of("AUDIO", kept)), left)
    image = min(max(0, _of("IMAGE", asked) + _of("IMAGE", used) - _of("IMAGE", kept)), left - audio)
    spoken = min(_of("AUDIO", usage.candidates_tokens_details), answer)
    return Usage(
        input=left - audio - image,
        cache_read=cached,
        audio_input=audio,
        image_input=image,
        output=answer - spoken,
        reasoning=thoughts + unexplained,
        audio_output=spoken,
    )


def _of(modality: str, details: Sequence[ModalityTokens] | None) -> int:
    return sum(max(0, one.token_count or 0) for one in details or () if one.modality == modality)


# --- one candidate ----------------------------------------------------------------------------------------------------


class _Choice:
    """One choice of an answer as it grows. Every event's parts become one delta."""

    __slots__ = ("_calls", "_details", "_images", "_index", "_said", "_stamp", "finish_reason")

    def __init__(self, stamp: Stamp, index: int) -> None:
        self.finish_reason: str | None = None
        self._stamp = stamp
        self._index = index
        self._calls = self._details = self._images = 0
        self._said = False

    def delta(self, parts: Sequence[Part]) -> WrittenMessage | None:
        """What these parts add; None where they add nothing."""
        text = "".join([part.text for part in parts if part.text and not part.thought])
        thoughts = "".join([part.text for part in parts if part.text and part.thought])
        calls: list[WrittenToolCall] = []
        details: list[dict[str, object]] = []
        images: list[dict[str, object]] = []
        for part in parts:
            call = None if part.function_call is None else self._call(part.function_call)
            if call is not None:
                calls.append(call)
            if part.inline_data is not None:
                images.append(self._image(part.inline_data))
            if part.thought_signature:
                details.append(self._detail(part.thought_signature, call))
        if not (text or thoughts or calls or details or images):
            return None
        self._said = self._said or bool(text or calls)
        delta = WrittenMessage()
        delta.content = text or UNSET
        delta.reasoning_content = thoughts or UNSET
        delta.reasoning_details = details or UNSET
        delta.tool_calls = calls or UNSET
        delta.images = images or UNSET
        return delta

    def finish(self, candidate: Candidate) -> WrittenMessage:
        """The last delta: empty, but for a refusal, or for a text that never came. Sets `finish_reason`."""
        reason = candidate.finish_reason or ""
        delta = WrittenMessage()
        if reason in BLOCKED:
            self.finish_reason = "content_filter"
            delta.refusal = _refusal(candidate.finish_message, "answer", reason)
            return delta
        if reason not in FINISHED and not (self._said or self._images):
            raise VendorFailed("the vendor ended its answer before it began", vendor_code=reason)
        finished = FINISHED.get(reason, "stop")
        self.finish_reason = "tool_calls" if self._calls and finished == "stop" else finished
        if not self._said:
            delta.content = ""
        return delta

    def block(self, feedback: PromptFeedback) -> WrittenMessage:
        """The only delta where the vendor did not let the model answer."""
        self.finish_reason = "content_filter"
        delta = WrittenMessage()
        delta.refusal = _refusal(feedback.block_reason_message, "prompt", feedback.block_reason or "")
        return delta

    def _call(self, call: FunctionCall) -> WrittenToolCall:
        """Older models give their calls no id: it is made from the answer's, so that it is one of its kind."""
        number, self._calls = self._calls, self._calls + 1
        own = f"call_{self._stamp.id.removeprefix('chatcmpl-')}_{self._index}_{number}"
        try:
            arguments = "{}" if bytes(call.args) in _NOTHING else bytes(call.args).decode()
        except UnicodeDecodeError as error:
            raise VendorBroke("the vendor's function call is not UTF-8") from error
        return WrittenToolCall(number, call.id or own, "function", {"name": call.name, "arguments": arguments})

    def _detail(self, signature: str, call: WrittenToolCall | None) -> dict[str, object]:
        """What the client sends back unchanged, so that the signature finds its part again."""
        number, self._details = self._details, self._details + 1
        detail: dict[str, object] = {
            "type": "reasoning.encrypted",
            "data": signature,
            "format": SIGNATURE_FORMAT,
            "index": number,
        }
        return detail if call is None else detail | {"id": call.id}

    def _image(self, blob: Blob) -> dict[str, object]:
        number, self._images = self._images, self._images + 1
        url = f"data:{blob.mime_type};base64,{blob.data}"
        return {"type": "image_url", "image_url": {"url": url}, "index": number}


def _refusal(message: str | None, what: str, reason: str) -> str:
    return f"{message or f'The vendor blocked the {what}.'} ({reason})"


def _logprobs(result: LogprobsResult | None) -> Raw | None:
    """OpenAI's form; None where there are none."""
    if result is None or not result.chosen_candidates:
        return None
    top = result.top_candidates or []
    tokens = []
    for place, chosen in enumerate(result.chosen_candidates):
        others = top[place].candidates if place < len(top) else None
        tokens.append(_token(chosen) | {"top_logprobs": [_token(other) for other in others or ()]})
    return Raw(_encode({"content": tokens, "refusal": None}))


def _token(candidate: LogprobsCandidate) -> dict[str, object]:
    token = candidate.token or ""
    return {"token": token, "logprob": candidate.log_probability or 0.0, "bytes": list(token.encode())}


# --- whole answers and streams ----------------------------------------------------------------------------------------


class GeminiStream(StreamReader):
    """Every event is decoded, and leaves as one delta a candidate. The bytes end without a terminator."""

    __slots__ = (
        "_choices",
        "_splitter",
        "_stamp",
        "_usage",
        "finish_reason",
        "model",
        "request_id",
        "service_tier",
        "usage",
    )

    def __init__(self, stamp: Stamp) -> None:
        self.usage = None
        self.model = None
        self.request_id = None
        self.finish_reason = None
        self.service_tier = None
        self._stamp = stamp
        self._usage: Usage | None = None
        self._choices: dict[int, _Choice] = {}
        self._splitter = FrameSplitter()

    @property
    def finished(self) -> bool:
        return bool(self._choices) and all(choice.finish_reason for choice in self._choices.values())

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        for event in split(self._splitter, chunk):
            data = data_of(event)
            if not data:  # a comment
                continue
            for index, delta, reason, logprobs in self.read(data):
                kind = Kind.CONTENT if delta.role is UNSET else Kind.START
                yield (
                    kind,
                    chat_shape.chunk(
                        self._stamp, self.model, delta, index=index, finish_reason=reason, logprobs=logprobs
                    ),
                )

    def end(self) -> Iterator[Frame]:
        if self.usage is not None:
            yield Kind.USAGE, chat_shape.usage_chunk(self._stamp, self.model, self.usage)
        yield Kind.DONE, DONE

    def text_bytes(self, frame: bytes) -> int:
        return text_bytes(frame)

    def read(self, data: bytes) -> Iterator[tuple[int, WrittenMessage, str | None, Raw | None]]:
        """What one event adds: index of the choice, delta, why it finished, logprobs. Raises VendorError.

        The first delta of a choice has the role, and nothing else.
        """
        try:
            event = _answer.decode(data)
        except _UNREADABLE as error:
            raise VendorBroke("the vendor sent an answer that cannot be decoded") from error
        if event.model_version:
            self.model = event.model_version
        if event.response_id and self.request_id is None:
            self.request_id = event.response_id
            self._stamp = msgspec.structs.replace(self._stamp, id=event.response_id)
        self._note_usage(event.usage_metadata)
        if bytes(event.error) not in _NOTHING:
            raise error_in_answer(event.error)
        for candidate in event.candidates or ():
            yield from self._read_candidate(candidate)
        blocked = event.prompt_feedback
        if blocked is not None and blocked.block_reason and not self._choices:
            choice = self._choices[0] = _Choice(self._stamp, 0)
            yield 0, WrittenMessage(role="assistant"), None, None
            delta = choice.block(blocked)
            self.finish_reason = choice.finish_reason
            yield 0, delta, choice.finish_reason, None
        if self.finished:
            self.usage = self._usage

    def _read_candidate(self, candidate: Candidate) -> Iterator[tuple[int, WrittenMessage, str | None, Raw | None]]:
        index = candidate.index or 0
        if not 0 <= index < MAX_CHOICES:
            raise VendorBroke("the vendor's answer has a candidate of no possible number")
        while len(self._choices) <= index:  # OpenAI's SDK wants to hear of the choices in their order
            number = len(self._choices)
            self._choices[number] = _Choice(self._stamp, number)
            yield number, WrittenMessage(role="assistant"), None, None
        choice = self._choices[index]
        if candidate.finish_reason in MISFIRED:
            raise VendorFailed("the vendor's model wrote a malformed answer", vendor_code=candidate.finish_reason)
        logprobs = _logprobs(candidate.logprobs_result)
        content = candidate.content
        delta = None if content is None else choice.delta(content.parts or ())
        if delta is not None or logprobs is not None:
            yield index, delta or WrittenMessage(), None, logprobs
        if candidate.finish_reason and choice.finish_reason is None:
            last = choice.finish(candidate)
            if self.finish_reason is None or index == 0:
                self.finish_reason = choice.finish_reason
            yield index, last, choice.finish_reason, None

    def _note_usage(self, usage: UsageMetadata | None) -> None:
        """Every event counts anew. Some models count the answer in the last one only: until then there is no usage."""
        counted = usage_of(usage)
        if usage is not None:
            self.service_tier = usage.service_tier or usage.traffic_type or self.service_tier
        if counted is not None:
            self._usage = counted
            if counted.total_output:
                self.usage = counted


def response(body: bytes, stamp: Stamp) -> Answer:
    reader = GeminiStream(stamp)
    messages: dict[int, WrittenMessage] = {}
    logprobs: dict[int, Raw] = {}
    reasons: dict[int, str] = {}
    for index, delta, finish_reason, scores in reader.read(body):
        if index not in messages:
            messages[index] = WrittenMessage(role="assistant", content=None, refusal=None)
        for name in ("content", "refusal", "reasoning_content", "reasoning_details", "tool_calls", "images"):
            if getattr(delta, name) is not UNSET:
                setattr(messages[index], name, getattr(delta, name))
        if scores is not None:
            logprobs[index] = scores
        if finish_reason is not None:
            reasons[index] = finish_reason
    if not reader.finished:
        raise VendorBroke("the vendor's answer has no end")
    for message in messages.values():
        for call in message.tool_calls or ():
            call.index = None
    choices = [
        WrittenChoice(index, message, reasons[index], logprobs.get(index))
        for index, message in sorted(messages.items())
    ]
    usage = reader.usage
    id_stamp = stamp if reader.request_id is None else msgspec.structs.replace(stamp, id=reader.request_id)
    return Answer(
        body=chat_shape.completion(id_stamp, reader.model, choices, usage),
        model=reader.model,
        usage=usage,
        finish_reason=reader.finish_reason,
        text_bytes=0 if usage else sum(len(_encode(message)) for message in messages.values()),
        service_tier=reader.service_tier,
        request_id=reader.request_id,
    )
