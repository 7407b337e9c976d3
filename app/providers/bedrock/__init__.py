"""AWS Bedrock: Converse and ConverseStream for chat, InvokeModel for embeddings.

Source: the Bedrock user guide and API reference, and botocore's model of `bedrock-runtime` (2023-09-30). The request id
of every answer and error stands in `x-amzn-requestid`.
"""

from __future__ import annotations

from app.providers.bedrock.embeddings import embed, embedded
from app.providers.bedrock.errors import error
from app.providers.bedrock.request import chat
from app.providers.bedrock.response import response
from app.providers.bedrock.signing import sign
from app.providers.bedrock.stream import ConverseStream
from app.providers.translator import Translator

BEDROCK = Translator(
    chat=chat,
    sign=sign,
    response=response,
    stream=ConverseStream,
    error=error,
    request_id_header="x-amzn-requestid",
    embed=embed,
    embedded=embedded,
)
