"""What clients speak at our front doors: the routes that a call can come by."""

from __future__ import annotations

from app.core import Dialect
from app.dialects import openai_chat, openai_embeddings

ROUTES: dict[str, Dialect] = {
    "/v1/chat/completions": Dialect(openai_chat.read, openai_chat.error_body, openai_chat.error_frames),
    "/v1/embeddings": Dialect(openai_embeddings.read, openai_chat.error_body, openai_chat.error_frames),
}
"""By path; each takes POST."""
