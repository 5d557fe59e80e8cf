"""Blocks of documents → blocks of tokens, in order, on every core."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rekindle.data.cores import usable_cores
from rekindle.data.sources.base import Block, Source
from rekindle.data.tokenizer import Tokenizer, string_buffers

if TYPE_CHECKING:
    import pyarrow as pa

AHEAD = 2  # blocks that are read while every thread is busy


@dataclass(frozen=True)
class Encoded:
    """A block of documents as tokens."""

    block: Block
    tokens: np.ndarray  # uint16, each document led by end_of_text
    starts: np.ndarray  # (documents + 1,) where each begins, and the end of the last
    validation: np.ndarray  # (documents,) bool: belongs to the validation split


def encoded_blocks(
    source: Source, tokenizer: Tokenizer, cursor: tuple[int, int], fraction: float
) -> Iterator[Encoded]:
    """All documents of `source` from `cursor` (file, documents of it to skip) on, encoded.

    Threads, not processes: the encoder releases the interpreter's lock, and nothing is copied.
    Only so many blocks are under way that memory does not depend on the size of the source.
    """
    threads = usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Encoded]] = deque()
        try:
            for block in _blocks(source, cursor):
                split = source.files[block.file].split
                under_way.append(pool.submit(_encode, block, tokenizer, split, fraction))
                if len(under_way) > threads + AHEAD:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _blocks(source: Source, cursor: tuple[int, int]) -> Iterator[Block]:
    first, skip = cursor
    for file in range(first, len(source.files)):
        yield from source.blocks(file, skip if file == first else 0)


def _encode(block: Block, tokenizer: Tokenizer, split: str | None, fraction: float) -> Encoded:
    tokens, starts = tokenizer.encode_documents(block.texts)
    if split is None:
        validation = is_validation(block.texts, fraction)
    else:
        validation = np.full(len(block.texts), split == "val")
    return Encoded(block, tokens, starts, validation)


def is_validation(texts: "pa.StringArray", fraction: float) -> np.ndarray:
    """Which documents are validation: (documents,) bool, true for about `fraction` of them.

    Decided by a hash of the text alone, so that the same text is on one side wherever it stands.
    """
    offsets, data = string_buffers(texts)
    view, limit = memoryview(data.data), int(fraction * 2**64)

    def chosen(start: int, end: int) -> bool:
        digest = hashlib.blake2b(view[start:end], digest_size=8, key=b"rekindle validation")
        return int.from_bytes(digest.digest(), "little") < limit

    ends = offsets.tolist()
    return np.fromiter(map(chosen, ends[:-1], ends[1:]), bool, len(texts))
