"""A source written outside the package: documents of ascending numbers, in two files."""

import hashlib
from collections.abc import Iterator

import pyarrow as pa

from rekindle.data.sources.base import Block, Source, SourceFile

BLOCK = 5  # documents


class CounterSource(Source):
    """Document n counts from 0 to n. The second file continues where the first one ends."""

    name, revision, licence = "counter", "1", "none"

    def __init__(self, first: int, second: int) -> None:
        self.numbers = [range(first), range(first, first + second)]
        self.files = [SourceFile(f"file {i}", len(r)) for i, r in enumerate(self.numbers)]

    def texts(self, file: int) -> list[str]:
        return [" ".join(map(str, range(number + 1))) for number in self.numbers[file]]

    @property
    def text_bytes(self) -> int:
        return sum(len(text) for file in (0, 1) for text in self.texts(file))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(str(self.numbers).encode()).hexdigest()

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        texts = self.texts(file)
        for first in range(skip, len(texts), BLOCK):
            some = texts[first : first + BLOCK]
            yield Block(pa.array(some, pa.string()), file, first, (first + len(some)) / len(texts))
