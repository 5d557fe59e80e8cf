"""Plain text files."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rekindle.data import content
from rekindle.data.cutting import character
from rekindle.data.sources import local
from rekindle.data.sources.base import Block
from rekindle.data.sources.local import LocalSource, Piece, gather
from rekindle.data.tokenizer import END_OF_TEXT
from rekindle.errors import UserError

NEWLINES = b"\r\n"


class TextSource(LocalSource):
    """Plain UTF-8 text: a file is one document, or several with `<|endoftext|>` between them.

    Newlines next to a separator belong to it; all other text is kept unchanged.
    """

    suffixes = (".txt", ".md", ".text")

    def read(self, file: int, skip: int) -> Iterator[Block]:
        path, size = self.paths[file], self.files[file].size
        kind = content.kind_of(content.head_of(path))
        if kind and kind != content.PAGE:  # a web page is valid text
            raise UserError(f"{path} is {content.describe(kind)}")
        return gather(_documents(path, size), file, skip)


@dataclass(frozen=True)
class _Raw:
    """The bytes between two separators, or a part of them if they are too long."""

    data: bytes
    start: int  # offset in the file
    begins: bool
    ends: bool


def _documents(path: Path, size: int) -> Iterator[Piece]:
    for raw in _split(path, END_OF_TEXT.encode()):
        _check_utf8(raw, path)
        text, end = raw.data, raw.start + len(raw.data)
        if raw.begins:
            text = text.removeprefix(codecs.BOM_UTF8) if raw.start == 0 else text.lstrip(NEWLINES)
        if raw.ends and end != size:
            text = text.rstrip(NEWLINES)
        if (text and not text.isspace()) or not (raw.begins and raw.ends):
            yield Piece(text, min(1.0, end / max(1, size)), raw.begins, raw.ends)


def _check_utf8(raw: _Raw, path: Path) -> None:
    """Raise `UserError` unless `raw` is UTF-8. Decodes in parts, because decoded text takes up to
    four times the memory of its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, max(1, len(raw.data)), local.PART_BYTES):
        before = len(decoder.getstate()[0])  # bytes of a character cut by the previous part
        end = at + local.PART_BYTES
        try:
            decoder.decode(raw.data[at:end], final=end >= len(raw.data))
        except UnicodeDecodeError as error:
            position = raw.start + at - before + error.start
            raise UserError(
                f"{path} is not UTF-8 text (byte {position}: {error.reason}): convert it first"
            ) from None


def _split(path: Path, separator: bytes) -> Iterator[_Raw]:
    """Split a file at separators, reading only as far as needed; a part longer than `LONG_BYTES`
    is cut."""
    buffer = bytearray()
    start = searched = 0  # offset of the buffer in the file; bytes of it already searched
    begins = True
    with open(path, "rb") as file:
        while chunk := file.read(local.BLOCK_BYTES):
            buffer += chunk
            while (found := buffer.find(separator, searched)) >= 0:
                yield _Raw(_copy(buffer, found), start, begins, True)
                del buffer[: found + len(separator)]
                start += found + len(separator)
                searched, begins = 0, True
            searched = max(0, len(buffer) - len(separator) + 1)
            if len(buffer) > local.LONG_BYTES or not begins:
                end = _cut(buffer, searched)
                yield _Raw(_copy(buffer, end), start, begins, False)
                del buffer[:end]
                start, searched, begins = start + end, searched - end, False
    yield _Raw(bytes(buffer), start, begins, True)


def _copy(buffer: bytearray, end: int) -> bytes:
    """Copy the first `end` bytes of a buffer, without an intermediate copy."""
    with memoryview(buffer) as view:
        return bytes(view[:end])


def _cut(buffer: bytearray, limit: int) -> int:
    """Where an unfinished document can be cut: between two characters, and not inside a possible
    separator (after `limit`) or the newlines before it."""
    end = limit
    while end and buffer[end - 1] in NEWLINES:
        end -= 1
    return character(buffer, end or limit)
