"""The content of messages as Converse blocks: text, images, documents, audio, reasoning, cache points."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import TypeVar

from app.config import Target
from app.errors import InvalidRequest
from app.providers.bedrock.models import is_claude, reasoning_format
from app.providers.chat_shape import cannot
from app.wire import CacheControl, ChatMessage, ContentPart, ImageUrl, InputAudio, InputFile

T = TypeVar("T")
Block = dict[str, object]

IMAGE_FORMATS = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/gif": "gif",
    "image/webp": "webp",
}
DOCUMENT_FORMATS = {
    "application/pdf": "pdf",
    "text/csv": "csv",
    "application/msword": "doc",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.ms-excel": "xls",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "text/html": "html",
    "text/plain": "txt",
    "text/markdown": "md",
}
AUDIO_FORMATS = frozenset({"mp3", "wav", "aac", "flac", "opus", "ogg", "m4a", "mp4", "webm", "pcm"})
_TEXT_PARTS = frozenset({"text", "refusal"})
_PARTS = {
    "user": frozenset({"text", "image_url", "file", "input_audio"}),
    "tool": frozenset({"text", "image_url", "file"}),
}
"""The parts that a message of each role may hold; of other roles, text."""
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w-]+=[^;,]*)*;base64,(.*)", re.DOTALL)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9\-()\[\]]+")
_NAME_CHARACTERS = 190


class Documents:
    """Names for the documents of one request: Bedrock wants each to have one of its own, in few characters."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def name(self, filename: str | None) -> str:
        """The file's name without its ending, with a number where it is taken."""
        stem = (filename or "").rpartition("/")[2]
        stem = stem.rpartition(".")[0] or stem
        wanted = name = _NOT_IN_NAMES.sub(" ", stem).strip()[:_NAME_CHARACTERS].strip() or "document"
        number = 1
        while name in self._taken:
            number += 1
            name = f"{wanted} {number}"
        self._taken.add(name)
        return name


def blocks_of(message: ChatMessage, path: str, target: Target, documents: Documents) -> list[Block]:
    """The message's content. Empty text, which Bedrock refuses and which says nothing, is left out."""
    if isinstance(message.content, str):
        return [{"text": message.content}] if message.content else []
    blocks: list[Block] = []
    for place, part in enumerate(message.content or ()):
        here = f"{path}.content[{place}]"
        if part.type not in _PARTS.get(message.role, _TEXT_PARTS):
            raise cannot(f"{here}.{part.type}", target, f"a message of the role `{message.role}` cannot hold it")
        block = _KINDS[part.type](part, here, target, documents)
        if block is not None:
            blocks.append(block)
        if part.cache_control is not None:
            blocks.append(cache_point(part.cache_control))
    return blocks


def cache_point(hint: CacheControl) -> Block:
    point: Block = {"type": "default"}
    if hint.ttl is not None:
        point["ttl"] = hint.ttl
    return {"cachePoint": point}


def reasoning_blocks(message: ChatMessage, target: Target) -> list[Block]:
    """The reasoning that such a model gave before; another vendor's has no meaning here."""
    blocks: list[Block] = []
    for detail in message.reasoning_details or ():
        if detail.format not in (None, reasoning_format(target.model)):
            continue
        if detail.type == "reasoning.text":
            text: Block = {"text": detail.text or ""}
            if detail.signature is not None:
                text["signature"] = detail.signature
            blocks.append({"reasoningContent": {"reasoningText": text}})
        elif detail.type == "reasoning.encrypted" and detail.data is not None:
            blocks.append({"reasoningContent": {"redactedContent": redacted(detail.data, target.model)}})
    return blocks


def redacted(data: str, model: str) -> str:
    """Bedrock puts what Anthropic hides reasoning in into base64 once more; details hold Anthropic's form."""
    return base64.b64encode(data.encode()).decode() if is_claude(model) else data


def unredacted(blob: str, model: str) -> str:
    """The other way; what is no text under the base64 stays as it came."""
    if not is_claude(model):
        return blob
    try:
        return base64.b64decode(blob, validate=True).decode()
    except ValueError:
        return blob


def _text(part: ContentPart, path: str, target: Target, documents: Documents) -> Block | None:
    if part.text is None:
        raise InvalidRequest(f"`{path}.text` is missing.", param=f"{path}.text")
    return {"text": part.text} if part.text else None


def _refusal(part: ContentPart, path: str, target: Target, documents: Documents) -> Block | None:
    return {"text": part.refusal} if part.refusal else None


def _image(part: ContentPart, path: str, target: Target, documents: Documents) -> Block:
    image: ImageUrl = _there(part.image_url, path, "image_url")
    here = f"{path}.image_url"
    if image.detail == "low":  # the others ask for what happens anyway
        raise cannot(f"{here}.detail", target)
    mime, data = _data(image.url, here, target)
    if mime not in IMAGE_FORMATS:
        raise cannot(here, target, f"images are PNG, JPEG, GIF or WebP, not {mime}")
    return {"image": {"format": IMAGE_FORMATS[mime], "source": {"bytes": data}}}


def _file(part: ContentPart, path: str, target: Target, documents: Documents) -> Block:
    file: InputFile = _there(part.file, path, "file")
    if file.file_id is not None:
        raise cannot(f"{path}.file.file_id", target, "send the file itself as `file_data`")
    here = f"{path}.file.file_data"
    mime, data = _data(_there(file.file_data, f"{path}.file", "file_data"), here, target)
    if mime not in DOCUMENT_FORMATS:
        raise cannot(here, target, f"documents are {', '.join(DOCUMENT_FORMATS.values())}, not {mime}")
    name = documents.name(file.filename)
    return {"document": {"format": DOCUMENT_FORMATS[mime], "name": name, "source": {"bytes": data}}}


def _audio(part: ContentPart, path: str, target: Target, documents: Documents) -> Block:
    audio: InputAudio = _there(part.input_audio, path, "input_audio")
    if audio.format not in AUDIO_FORMATS:
        raise cannot(f"{path}.input_audio.format", target)
    return {"audio": {"format": audio.format, "source": {"bytes": audio.data}}}


def _data(url: str, path: str, target: Target) -> tuple[str, str]:
    """MIME type and base64 of a data URL. Nothing is fetched, neither by us nor, with our credential, by Bedrock."""
    match = _DATA_URL.fullmatch(url)
    if match is None:
        raise cannot(path, target, "Bedrock takes the bytes themselves, as a base64 data URL")
    return match[1].lower(), match[2]


def _there(value: T | None, path: str, member: str) -> T:
    if value is None:
        raise InvalidRequest(f"`{path}.{member}` is missing.", param=f"{path}.{member}")
    return value


_KINDS: dict[str, Callable[[ContentPart, str, Target, Documents], Block | None]] = {
    "text": _text,
    "refusal": _refusal,
    "image_url": _image,
    "file": _file,
    "input_audio": _audio,
}
