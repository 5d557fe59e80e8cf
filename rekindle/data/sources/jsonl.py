"""JSON Lines with the field `text`."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rekindle.data.sources.base import Block
from rekindle.data.sources.local import LocalSource, gather
from rekindle.errors import UserError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
COMPRESSION_RATIO = 3  # of English text under gzip or zstd, for the estimate of size


class JsonLinesSource(LocalSource):
    """Files of one JSON object a line with the field `text`; gzip and zstd are read as they are."""

    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    @property
    def text_bytes(self) -> int:
        return sum(
            file.size * (COMPRESSION_RATIO if Path(file.name).suffix in COMPRESSION else 1)
            for file in self.files
        )

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        documents = self._documents(self.paths[file], self.files[file].size)
        return gather(documents, file, skip)

    def _documents(self, path: Path, size: int) -> Iterator[tuple[bytes, float]]:
        import pyarrow as pa

        number = 0
        try:
            with pa.OSFile(str(path)) as raw:
                for number, line in enumerate(_lines(raw, path), 1):
                    if line.strip() and (text := _text_of(line, path, number)) is not None:
                        yield text, raw.tell() / max(1, size)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read past line {number} ({reason})") from None


def _lines(raw: Any, path: Path) -> Iterable[bytes]:
    """The lines of an open file, decompressed where its suffix says so."""
    import pyarrow as pa

    kind = COMPRESSION.get(path.suffix)
    stream = pa.CompressedInputStream(raw, kind) if kind else raw
    return io.BufferedReader(stream, 1 << 20)  # type: ignore[arg-type]


def _text_of(line: bytes, path: Path, number: int) -> bytes | None:
    """The field `text` of one line as UTF-8; None where it is null."""
    try:
        record = json.loads(line)
        text = record["text"]
        return None if text is None else text.encode()
    except UnicodeError as error:
        problem = f"text that is not valid Unicode ({error})"
    except ValueError as error:
        problem = f"no JSON ({error})"
    except (KeyError, TypeError, AttributeError):
        problem = "no JSON object with a string field 'text'"
    raise UserError(f"{path}:{number} holds {problem}: mend or remove the line")
