"""Plain text files."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from rekindle.data.sources import local
from rekindle.data.sources.base import Block
from rekindle.data.sources.local import LocalSource, gather
from rekindle.data.tokenizer import END_OF_TEXT
from rekindle.errors import UserError


class TextSource(LocalSource):
    """Plain UTF-8 text: a file is one document, or several with `<|endoftext|>` between them.

    Newlines beside a separator belong to it; all other text is taken as it is.
    """

    suffixes = (".txt", ".md", ".text")

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        documents = self._documents(self.paths[file], self.files[file].size)
        return gather(documents, file, skip)

    def _documents(self, path: Path, size: int) -> Iterator[tuple[bytes, float]]:
        for raw, start in _split(path, END_OF_TEXT.encode()):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 text (byte {start + error.start}: {error.reason}): "
                    "convert it first"
                ) from None
            end = start + len(raw)
            text = raw.removeprefix(codecs.BOM_UTF8) if start == 0 else raw.lstrip(b"\r\n")
            text = text if end == size else text.rstrip(b"\r\n")
            if text.strip():
                yield text, min(1.0, end / max(1, size))


def _split(path: Path, separator: bytes) -> Iterator[tuple[bytes, int]]:
    """The parts of a file between separators and where each starts; reads only as far as needed."""
    buffer = bytearray()
    start = searched = 0  # offset of the buffer in the file; how much of it has no separator
    with open(path, "rb") as file:
        while chunk := file.read(local.BLOCK_BYTES):
            buffer += chunk
            while (found := buffer.find(separator, searched)) >= 0:
                yield bytes(buffer[:found]), start
                del buffer[: found + len(separator)]
                start += found + len(separator)
                searched = 0
            searched = max(0, len(buffer) - len(separator) + 1)
    yield bytes(buffer), start
