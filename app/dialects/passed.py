"""The front door's routes that are passed on as they came: read as far as limits and the ledger need.

Legacy completions, moderations, speech, transcripts and images. Errors are those of chat.
Source: OpenAI API reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Raw

from app import prompt_size
from app.dialects import multipart
from app.dialects.openai_chat import (
    MAX_CHOICES,
    MAX_OUTPUT_TOKENS,
    alias_of,
    member,
    members,
    named_alias,
)
from app.errors import InvalidRequest
from app.wire import Field, PassedRequest, StreamOptions, Units

_flag = msgspec.json.Decoder(bool | None)
_word = msgspec.json.Decoder(str | None)
_text = msgspec.json.Decoder(str)
_options = msgspec.json.Decoder(StreamOptions | None)
_tokens = msgspec.json.Decoder(Annotated[int, Meta(ge=0, le=MAX_OUTPUT_TOKENS)] | None)
_count = msgspec.json.Decoder(Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None)
_prompt = msgspec.json.Decoder(str | list[str | int | list[int]])
LEGACY_OUTPUT_TOKENS = 16
"""How long an answer of legacy completions is that names no length."""
AUDIO_BYTES_PER_SECOND = 4_000
"""Of a file whose length nobody has told: speech at 32 kbit/s, so that a better recording is shorter than reserved."""
AUDIO_TOKENS_PER_SECOND = 10
"""OpenAI's for its transcripts. A file's tokens follow from its length, not from its bytes."""


def completions(body: bytes) -> PassedRequest:
    """Raises InvalidRequest, as all here."""
    fields = members(body)
    prompts = member(fields, "prompt", _prompt) if "prompt" in fields else ""
    stream = member(fields, "stream", _flag) or False
    options = member(fields, "stream_options", _options) if stream else None
    length = member(fields, "max_tokens", _tokens)
    answers = max(member(fields, "n", _count) or 1, member(fields, "best_of", _count) or 1)
    several = isinstance(prompts, list) and prompts and not isinstance(prompts[0], int)
    return PassedRequest(
        body=body,
        alias=alias_of(fields),
        path="/completions",
        operation="completions",
        serves="completions",
        fields=fields,
        stream=stream,
        include_usage=bool(options and options.include_usage),
        max_output_tokens=LEGACY_OUTPUT_TOKENS if length is None else length,
        choices=answers * (len(prompts) if several else 1),
    )


def moderations(body: bytes) -> PassedRequest:
    """Vendors take nothing for them."""
    fields = members(body)
    if "input" not in fields:
        raise InvalidRequest("`input` is required: a text, or a list of texts and images.", param="input")
    return PassedRequest(
        body=body,
        alias=alias_of(fields),
        path="/moderations",
        operation="moderations",
        serves="moderations",
        fields=fields,
        units=Units(),
    )


def speech(body: bytes) -> PassedRequest:
    fields = members(body)
    if "input" not in fields:
        raise InvalidRequest("`input` is required: the text to speak.", param="input")
    spoken = member(fields, "input", _text)
    return PassedRequest(
        body=body,
        alias=alias_of(fields),
        path="/audio/speech",
        operation="speech",
        serves="speech",
        fields=fields,
        stream=member(fields, "stream_format", _word) == "sse",
        include_usage=True,
        input_tokens=len(spoken) // prompt_size.BYTES_PER_TOKEN + 1,
        units=Units(characters=len(spoken)),
    )


def transcriptions(body: bytes) -> PassedRequest:
    return _transcript(body, "transcriptions")


def translations(body: bytes) -> PassedRequest:
    return _transcript(body, "translations")


def _transcript(body: bytes, operation: str) -> PassedRequest:
    form = multipart.read(body)
    seconds = max(1, -(-_file_bytes(form, "file") // AUDIO_BYTES_PER_SECOND))
    return PassedRequest(
        body=body,
        alias=_form_alias(form),
        path="/audio/" + operation,
        operation=operation,  # type: ignore[arg-type]
        serves="transcriptions",
        form=form,
        stream=_form_word(form, "stream") == "true",
        include_usage=True,
        input_tokens=seconds * AUDIO_TOKENS_PER_SECOND,
        units=Units(seconds=seconds),
    )


def images(body: bytes) -> PassedRequest:
    fields = members(body)
    return _images(body, fields, "generations")


def image_edits(body: bytes) -> PassedRequest:
    """A form, or JSON with images by address."""
    if not body.startswith(b"--"):
        return _images(body, members(body), "edits")
    form = multipart.read(body)
    written = _form_word(form, "n") or "1"
    if not (written.isascii() and written.isdigit() and 1 <= len(written) <= 3 and 1 <= int(written) <= MAX_CHOICES):
        raise InvalidRequest(f"`n` must be from 1 to {MAX_CHOICES}.", param="n")
    pictures = sum(field.name.startswith(("image", "mask")) for field in form)
    return PassedRequest(
        body=body,
        alias=_form_alias(form),
        path="/images/edits",
        operation="image_edits",
        serves="images",
        form=form,
        stream=_form_word(form, "stream") == "true",
        include_usage=True,
        input_tokens=prompt_size.tokens((_form_word(form, "prompt") or "").encode())
        + pictures * prompt_size.BLOB_TOKENS,
        units=Units(images=int(written)),
    )


def _images(body: bytes, fields: dict[str, Raw], what: str) -> PassedRequest:
    if "prompt" not in fields:
        raise InvalidRequest("`prompt` is required: what the image shows.", param="prompt")
    return PassedRequest(
        body=body,
        alias=alias_of(fields),
        path="/images/" + what,
        operation="images" if what == "generations" else "image_edits",
        serves="images",
        fields=fields,
        stream=member(fields, "stream", _flag) or False,
        include_usage=True,
        input_tokens=prompt_size.tokens(body),
        units=Units(images=member(fields, "n", _count) or 1),
    )


def _form_alias(form: tuple[Field, ...]) -> str:
    return named_alias(_form_word(form, "model"))


def _form_word(form: tuple[Field, ...], name: str) -> str | None:
    """A field that is a word. Raises InvalidRequest where it stands twice: vendors differ in which they take."""
    found = [field for field in form if field.name == name]
    if len(found) > 1 or (found and found[0].file_name):
        raise InvalidRequest(f"`{name}` must be one field of the form.", param=name)
    try:
        return found[0].value.decode() if found else None
    except UnicodeDecodeError:
        raise InvalidRequest(f"`{name}` is not UTF-8.", param=name) from None


def _file_bytes(form: tuple[Field, ...], name: str) -> int:
    found = [field for field in form if field.name == name]
    if len(found) != 1:
        raise InvalidRequest(f"`{name}` is required: one file of the form.", param=name)
    return len(found[0].value)


READERS: Mapping[str, Callable[[bytes], PassedRequest]] = {
    "/v1/completions": completions,
    "/v1/moderations": moderations,
    "/v1/audio/speech": speech,
    "/v1/audio/transcriptions": transcriptions,
    "/v1/audio/translations": translations,
    "/v1/images/generations": images,
    "/v1/images/edits": image_edits,
}
"""By route."""
