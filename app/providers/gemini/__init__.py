"""Google Gemini: one translator, two rows. AI Studio signs with an API key, Vertex AI with a bearer token.

gemini   base_url https://generativelanguage.googleapis.com/v1beta
vertex   base_url https://<location>-aiplatform.googleapis.com/v1/projects/<project>/locations/<location>
"""

from __future__ import annotations

from app.config import Credential, Target
from app.providers.gemini.answer import GeminiStream, response
from app.providers.gemini.embeddings import batch, batched, predict, predicted
from app.providers.gemini.errors import error
from app.providers.gemini.request import Front, chat
from app.providers.openai import sign as sign_bearer
from app.providers.translator import Outgoing, Translator
from app.wire import ChatRequest, EmbedRequest

_AI_STUDIO = Front("models/", call_ids=True)
_VERTEX = Front("publishers/google/models/", call_ids=False)


def _chat_ai_studio(request: ChatRequest, target: Target) -> Outgoing:
    return chat(_AI_STUDIO, request, target)


def _chat_vertex(request: ChatRequest, target: Target) -> Outgoing:
    return chat(_VERTEX, request, target)


def _embed_ai_studio(request: EmbedRequest, target: Target) -> Outgoing:
    return batch(_AI_STUDIO, request, target)


def _embed_vertex(request: EmbedRequest, target: Target) -> Outgoing:
    return predict(_VERTEX, request, target)


def _sign_ai_studio(outgoing: Outgoing, credential: Credential, at: float) -> Outgoing:
    """The key in a header: in the URL it would stand in logs."""
    key = ("x-goog-api-key", credential.secret.reveal())
    return Outgoing(outgoing.url, (*outgoing.headers, key), outgoing.body)


GEMINI = Translator(
    chat=_chat_ai_studio,
    sign=_sign_ai_studio,
    response=response,
    stream=GeminiStream,
    error=error,
    request_id_header="x-request-id",
    embed=_embed_ai_studio,
    embedded=batched,
)
VERTEX = Translator(
    chat=_chat_vertex,
    sign=sign_bearer,
    response=response,
    stream=GeminiStream,
    error=error,
    request_id_header="x-request-id",
    embed=_embed_vertex,
    embedded=predicted,
)
