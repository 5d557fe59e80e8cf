"""JSON Lines with a `text` field."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rekindle.data import content
from rekindle.data.sources.base import Block
from rekindle.data.sources.local import LocalSource, Piece, gather
from rekindle.errors import UserError

PACKED = (content.GZIP, content.ZSTD)  # decompressed while reading
COMPRESSION_RATIO = 3  # of English text under gzip or zstd, used to estimate the size
LONGEST_LINE = 256 << 20  # bytes; parsing a line takes several times its size in memory


class JsonLinesSource(LocalSource):
    """Files with one JSON object per line and a `text` field; gzip and zstd are decompressed."""

    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    @property
    def text_bytes(self) -> int:
        return sum(
            file.size * (COMPRESSION_RATIO if _kind(path) in PACKED else 1)
            for path, file in zip(self.paths, self.files, strict=True)
        )

    def read(self, file: int, skip: int) -> Iterator[Block]:
        return gather(_documents(self.paths[file], self.files[file].size), file, skip)


def _kind(path: Path) -> str:
    return content.kind_of(content.head_of(path))


def _documents(path: Path, size: int) -> Iterator[Piece]:
    import pyarrow as pa

    number = 0
    try:
        with open(path, "rb", buffering=0) as raw, closing(_stream(raw, path)) as stream:
            while line := stream.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}:{number} is a line of more than {LONGEST_LINE:,} bytes: save such "
                        "a long document as a separate file and use --text"
                    )
                if line.strip() and (text := _text_of(line, path, number)) is not None:
                    yield Piece(text, min(1.0, raw.tell() / max(1, size)))
    except (pa.ArrowException, EOFError, OSError, zlib.error) as error:
        if isinstance(error, MemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is truncated or damaged after line {number} ({reason}): download it again"
        ) from None


def _stream(raw: io.FileIO, path: Path) -> Any:
    """The content of an open file, decompressed if necessary, regardless of the file's name."""
    import pyarrow as pa

    kind = content.kind_of(raw.read(content.HEAD) or b"")
    raw.seek(0)
    if kind == content.GZIP:
        stream = _buffered(gzip.GzipFile(fileobj=raw).read1)
    elif kind == content.ZSTD:
        # In small steps, because data decompressed before an error in the same step is lost.
        packed = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
        stream = _buffered(lambda count: packed.read(min(count, 1 << 16)))
    else:
        stream = io.BufferedReader(raw, 1 << 20)
    inside = content.kind_of(stream.peek(content.HEAD)) if kind in PACKED else kind
    if inside:
        packing = f"{kind} data whose content is " if kind in PACKED else ""
        raise UserError(f"{path} is {packing}{content.describe(inside)}")
    return stream


class _Reader(io.RawIOBase):
    """A raw stream over a function that is called once per read."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _buffered(read: Callable[[int], bytes]) -> Any:
    return io.BufferedReader(_Reader(read), 1 << 20)


def _text_of(line: bytes, path: Path, number: int) -> bytes | None:
    """The `text` field of one line as UTF-8; None if it is null."""
    fields = ""
    try:
        record = _parse(line)
        if isinstance(record, dict) and "text" not in record:
            fields = f" (its fields: {', '.join(map(repr, list(record)[:9])) or 'none'})"
        text = record["text"]
        return None if text is None else text.encode()
    except UnicodeError as error:
        problem = f"text that is not valid Unicode ({error})"
    except RecursionError:
        problem = "JSON that is nested too deeply"
    except ValueError as error:
        problem = f"invalid JSON ({error})"
        _explain(line, path, number)
    except (KeyError, TypeError, AttributeError):
        problem = f"no JSON object with a string field 'text'{fields}"
        if line.lstrip()[:1] == b"[":
            _explain(line, path, number)
    raise UserError(f"{path}:{number} contains {problem}: fix or remove the line")


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError:  # an integer with more digits than Python converts
        return json.loads(line, parse_int=float)


def _explain(line: bytes, path: Path, number: int) -> None:
    """Raise `UserError` if the file is JSON, but not one value per line."""
    start = line.removeprefix(b"\xef\xbb\xbf").strip()
    if start[:1] == b"[" and _is_first(path, number):
        raise UserError(
            f"{path} is a JSON array, not JSON Lines: convert it (`jq -c '.[]' FILE > NEW.jsonl`)"
        )
    if start[:1] in b"{[" and _is_open(start):
        raise UserError(
            f"{path}:{number} starts a JSON value that spans several lines: put each value on one "
            "line (`jq -c . FILE > NEW.jsonl`)"
        )


def _is_open(start: bytes) -> bool:
    """Whether `start` is a valid but incomplete JSON value."""
    try:
        json.loads(start)
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except ValueError:
        return False
    return False


def _is_first(path: Path, number: int) -> bool:
    """Whether all lines before this one are blank."""
    with open(path, "rb", buffering=0) as raw, closing(_stream(raw, path)) as stream:
        return not any(stream.readline().strip(b"\xef\xbb\xbf \t\r\n") for _ in range(number - 1))
