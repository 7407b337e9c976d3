"""Reader of recorded vendor traffic (the folder that the environment variable RECORDINGS names).

The folder has one sub-folder a vendor; each file is YAML in one of three forms: vcrpy
(`interactions`, `body.string`; in its older kind `content` and `status_code`), vcrpy with
`parsed_body` instead of the body's text (JSON kept as YAML: complete, but key order and white space
are not the vendor's), and Ruby VCR (`http_interactions`). Binary bodies stand as `!!binary` or
`!binary` in base64; answers that the vendor compressed are decompressed here, so that `body` is
always what a client reads.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import msgspec
import yaml


class Message(msgspec.Struct, frozen=True):
    """One side of an exchange. Header names are in lower case, each with all of its values."""

    headers: dict[str, list[str]]
    body: bytes
    ordered: bool
    """True when `body` is the vendor's own text; False when it was rebuilt from `parsed_body`."""

    def header(self, name: str) -> str | None:
        """The first value of the header `name` (any case), None when it is absent."""
        values = self.headers.get(name.lower())
        return values[0] if values else None

    def json(self) -> Any:
        """The body as JSON; raises `ValueError` when it is something else."""
        return json.loads(self.body)


class Request(Message, frozen=True):
    method: str
    uri: str


class Response(Message, frozen=True):
    status: int

    @property
    def streamed(self) -> bool:
        return (self.header("content-type") or "").startswith("text/event-stream")

    def events(self) -> list[str]:
        """The `data:` payloads of an SSE body, in order, `[DONE]` included, comments left out."""
        lines = self.body.decode().splitlines()
        return [line[5:].strip() for line in lines if line.startswith("data:")]


class Exchange(msgspec.Struct, frozen=True):
    """One recorded request and its answer."""

    file: str
    vendor: str
    """Name of the sub-folder, such as `openai` or `azure-openai`."""
    index: int
    """Place of the exchange in its file, from 0."""
    request: Request
    response: Response

    @property
    def name(self) -> str:
        """A short name for test ids."""
        return f"{self.vendor}/{self.file}#{self.index}"


class _Loader(yaml.SafeLoader):
    """The safe loader plus Ruby's `!binary`; timestamps stay text."""


_Loader.add_constructor("!binary", yaml.SafeLoader.construct_yaml_binary)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def load(folder: str | Path) -> list[Exchange]:
    """Every exchange of every recording below `folder`, sorted by vendor, file and place."""
    exchanges = []
    for path in sorted(Path(folder).glob("*/*.y*ml")):
        document = yaml.load(path.read_bytes(), Loader=_Loader)
        pairs = document.get("interactions") or document["http_interactions"]
        for index, pair in enumerate(pairs):
            exchanges.append(_exchange(path, index, pair["request"], pair["response"]))
    return exchanges


def _exchange(path: Path, index: int, request: dict[str, Any], response: dict[str, Any]) -> Exchange:
    status = response["status"]["code"] if "status" in response else response["status_code"]
    request_headers, request_body, request_ordered = _message(request)
    response_headers, response_body, response_ordered = _message(response)
    return Exchange(
        file=path.name,
        vendor=path.parent.name,
        index=index,
        request=Request(
            headers=request_headers,
            body=request_body,
            ordered=request_ordered,
            method=request["method"].upper(),
            uri=request["uri"],
        ),
        response=Response(
            headers=response_headers,
            body=response_body,
            ordered=response_ordered,
            status=int(status),
        ),
    )


def _message(message: dict[str, Any]) -> tuple[dict[str, list[str]], bytes, bool]:
    headers = {
        name.lower(): [str(value) for value in (values if isinstance(values, list) else [values])]
        for name, values in (message.get("headers") or {}).items()
    }
    if "parsed_body" in message:
        return headers, json.dumps(message["parsed_body"], ensure_ascii=False).encode(), False
    body = message.get("body", message.get("content"))
    if isinstance(body, dict):
        body = body.get("string")
    if body is None:
        body = b""
    if isinstance(body, str):
        body = body.encode()
    return headers, _decompressed(body), True


def _decompressed(body: bytes) -> bytes:
    """Recorders keep `content-encoding` even where they decompressed, so the bytes decide."""
    if body[:2] == b"\x1f\x8b":
        return gzip.decompress(body)
    if body[:2] in (b"\x78\x01", b"\x78\x9c", b"\x78\xda"):
        return zlib.decompress(body)
    return body
