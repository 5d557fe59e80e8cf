"""A tokenizer written outside the package: one token per character, for eleven characters."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa


class DigitTokenizer:
    """Encodes the characters of `alphabet` and no others."""

    name = "digits"
    bytes_per_token = 1.0

    def __init__(self, alphabet: str = "0123456789 ") -> None:
        self.alphabet = alphabet
        self.vocab_size = len(alphabet) + 1
        self.end_of_text = len(alphabet)
        self.sha256 = hashlib.sha256(alphabet.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(character) for character in text]

    def encode_documents(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        documents = [[self.end_of_text, *self.encode(text)] for text in texts.to_pylist()]
        starts = np.cumsum([0, *map(len, documents)])
        return np.concatenate(documents).astype(np.uint16), starts

    def last_cut(self, text: bytes) -> int:
        return len(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.alphabet[token] for token in tokens)

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * len(self.alphabet) + [0])
