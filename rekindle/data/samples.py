"""Verify the fast encoder: a sample of each shard's documents is encoded again by the reference.

Data sets are encoded by a fast encoder; `Tokenizer.encode` is the reference. Every preparation
compares a sample spread over each shard, and stops at the first token that differs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MOST = 32  # documents per shard
LONGEST = 1 << 15  # characters compared per document, because the reference is slow


@dataclass(frozen=True)
class _Sample:
    number: int  # of the document within its shard
    text: str  # the whole text, or slightly more of its beginning than is compared
    tokens: np.ndarray


class Samples:
    """Up to 32 evenly spread documents of a stream of unknown length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: list[_Sample] = []
        self._stride = 1  # one document in `_stride` is kept
        self._count = 0

    def offer(
        self, texts: "pa.StringArray", numbers: np.ndarray, tokens: np.ndarray, starts: np.ndarray
    ) -> None:
        """Add documents `numbers` of a block; `tokens` and `starts` are those of the block."""
        first = -self._count % self._stride
        for k in range(first, len(numbers), self._stride):
            if (self._count + k) % self._stride:  # the stride doubled during this loop
                continue
            i = numbers[k]
            start = starts[i] + 1
            end = min(starts[i + 1], start + 4 * LONGEST)  # a character has at most four bytes
            encoded = tokens[start:end].copy()  # a view would keep the block's memory alive
            self._keep(_Sample(self._count + k, texts[i].as_py()[: LONGEST + 1], encoded))
        self._count += len(numbers)

    def _keep(self, sample: _Sample) -> None:
        self._kept.append(sample)
        if len(self._kept) > MOST:
            self._stride *= 2
            self._kept = [kept for kept in self._kept if kept.number % self._stride == 0]

    def check(self, where: str) -> None:
        """Compare with the reference. Raises `UserError` with the first difference."""
        for sample in self._kept:
            text, tokens = sample.text, sample.tokens.tolist()
            shortened = len(text) > LONGEST
            if shortened:
                start = text[:LONGEST].encode()
                text = start[: self._tokenizer.last_cut(start)].decode()
                if not text:  # one very long word without a safe cut
                    continue
            expected = self._tokenizer.encode(text)
            if shortened:
                tokens = tokens[: len(expected)]
            if tokens != expected:
                raise UserError(_difference(where, text, tokens, expected))


def _difference(where: str, text: str, tokens: list[int], expected: list[int]) -> str:
    pairs = enumerate(zip(tokens, expected, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(expected)))
    around = slice(max(0, at - 4), at + 5)
    return (
        f"{where}: the fast encoder and the reference differ at token {at} of the document "
        f"{text[:60]!r}: {tokens[around]}, expected {expected[around]}; nothing was written, "
        "please report this text"
    )
