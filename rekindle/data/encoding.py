"""Blocks of documents → blocks of tokens, in order, on every core."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rekindle.data.cores import usable_cores
from rekindle.data.sources.base import Block, Part, Source, validation_hash
from rekindle.data.tokenizer import Tokenizer, string_buffers
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

AHEAD = 2  # blocks that are read while every thread is busy
LONGEST_WORD = 16 << 20  # bytes without a safe cut; encoding them takes 20 times that in memory


@dataclass(frozen=True)
class Encoded:
    """A block of documents, or of a part of one, as tokens."""

    block: Block
    tokens: np.ndarray  # uint16; end_of_text comes before each document, and each part of one
    starts: np.ndarray  # (documents + 1,) start of each document, then the end of the last
    validation: np.ndarray  # (documents,) bool: in the validation split


def encoded_blocks(
    source: Source, tokenizer: Tokenizer, cursor: tuple[int, int], fraction: float
) -> Iterator[Encoded]:
    """Encode all documents of `source`, starting at `cursor` (file, documents in it to skip).

    Uses threads, not processes: the encoder releases the interpreter lock, and nothing is copied.
    The number of blocks in flight is bounded, so memory does not depend on the source's size.
    """
    threads = usable_cores()
    with ThreadPoolExecutor(threads) as pool:
        in_flight: deque[Future[Encoded]] = deque()
        try:
            for block in _cut(_blocks(source, cursor), source, tokenizer):
                split = source.files[block.file].split
                in_flight.append(pool.submit(_encode, block, tokenizer, split, fraction))
                if len(in_flight) > threads + AHEAD:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            for future in in_flight:
                future.cancel()


def _blocks(source: Source, cursor: tuple[int, int]) -> Iterator[Block]:
    first, skip = cursor
    for file in range(first, len(source.files)):
        yield from source.blocks(file, skip if file == first else 0)


def _cut(blocks: Iterator[Block], source: Source, tokenizer: Tokenizer) -> Iterator[Block]:
    """Move the boundaries between parts of a document to safe cuts, where encoding the parts
    separately gives the tokens of the whole: the text after a part's last safe cut is moved to
    the next part."""
    import pyarrow as pa

    rest, begins = b"", False
    for block in blocks:
        if block.part is None:
            yield block
            continue
        begins = begins or block.part.begins
        text = rest + block.texts[0].as_buffer().to_pybytes()
        end = len(text) if block.part.ends else tokenizer.last_cut(text)
        if end or block.part.ends:
            part = Part(begins, block.part.ends, block.part.hash)
            yield replace(block, texts=pa.array([text[:end]], pa.string()), part=part)
            begins = False
        rest = text[end:]
        if len(rest) > LONGEST_WORD:
            raise UserError(
                f"{source.files[block.file].name}: document {block.first + 1} contains more than "
                f"{LONGEST_WORD:,} bytes without a space or other word boundary for --tokenizer "
                f"{tokenizer.name}: break the text into lines, or remove the document"
            )


def _encode(block: Block, tokenizer: Tokenizer, split: str | None, fraction: float) -> Encoded:
    tokens, starts = tokenizer.encode_documents(block.texts)
    if split is not None:
        validation = np.full(len(block.texts), split == "val")
    elif block.part:  # without a hash, the document is too long to be held out
        hash = block.part.hash
        validation = np.array([hash is not None and hash < _limit(fraction)])
    else:
        validation = is_validation(block.texts, fraction)
    return Encoded(block, tokens, starts, validation)


def is_validation(texts: "pa.StringArray", fraction: float) -> np.ndarray:
    """Which documents are validation: (documents,) bool, true for about `fraction` of them.

    Depends only on a hash of the text, so copies of a text always land in the same split.
    """
    offsets, data = string_buffers(texts)
    view, limit = memoryview(data.data), _limit(fraction)

    def chosen(start: int, end: int) -> bool:
        return validation_hash(view[start:end]) < limit

    ends = offsets.tolist()
    return np.fromiter(map(chosen, ends[:-1], ends[1:]), bool, len(texts))


def _limit(fraction: float) -> int:
    """The bound on `validation_hash` below which `fraction` of all documents lie."""
    return int(fraction * 2**64)
