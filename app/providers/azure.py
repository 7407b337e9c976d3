"""Azure OpenAI: OpenAI's shape under deployments, with `api-key` and content filters.

A target's model is the name of its deployment. With `api_version` requests go to the deployment's own path, without
it to the version-less API, which names the deployment in the body. `prompt_filter_results` come as a first chunk
without choices and `content_filter_results` beside each delta: both are relayed. A filtered choice may have no
`message`, and a chunk's no `delta`; clients count on them, so an empty one is put there.

Source: Azure OpenAI REST API reference and API version lifecycle (Microsoft Learn), and recorded answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec.structs import replace

from app.config import Credential, Target
from app.providers import openai
from app.providers.chat_shape import rewritten, rewritten_frames
from app.providers.openai import OpenAIStream
from app.providers.translator import Answer, Frame, Outgoing, Stamp
from app.wire import ChatRequest, EmbedRequest


def chat(request: ChatRequest, target: Target) -> Outgoing:
    return replace(openai.chat(request, target), url=url(target, "/chat/completions"))


def embed(request: EmbedRequest, target: Target) -> Outgoing:
    return replace(openai.embed(request, target), url=url(target, "/embeddings"))


def url(target: Target, path: str) -> str:
    provider = target.provider
    if provider.api_version is None:
        return f"{provider.base_url}/openai/v1{path}"
    return f"{provider.base_url}/openai/deployments/{target.model}{path}?api-version={provider.api_version}"


def sign(outgoing: Outgoing, credential: Credential, at: float) -> Outgoing:
    return replace(outgoing, headers=(*outgoing.headers, ("api-key", credential.secret.reveal())))


class AzureStream(OpenAIStream):
    """Relays the frames, and puts a delta where a choice has none."""

    __slots__ = ()

    def plain(self, chunk: bytes) -> bool:
        return super().plain(chunk) and not _lacks_delta(chunk)

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        for kind, frames in super().feed(chunk):
            yield kind, rewritten_frames(frames, _complete_delta) if _lacks_delta(frames) else frames


def _lacks_delta(frames: bytes) -> bool:
    return frames.count(b'"delta":{') < frames.count(b'"choices":[{')


def response(body: bytes, stamp: Stamp) -> Answer:
    answer = openai.response(body, stamp)
    complete = body.count(b'"message":') >= body.count(b'"finish_reason":')
    return answer if complete else replace(answer, body=rewritten(body, _complete_message))


def _complete_delta(choice: dict[str, Any]) -> None:
    choice.setdefault("delta", {})


def _complete_message(choice: dict[str, Any]) -> None:
    choice.setdefault("message", {"role": "assistant", "content": None, "refusal": None})


AZURE = replace(
    openai.OPENAI,
    chat=chat,
    embed=embed,
    sign=sign,
    response=response,
    stream=AzureStream,
    request_id_header="apim-request-id",  # on every answer, refusals of a key included; support asks for it
)
