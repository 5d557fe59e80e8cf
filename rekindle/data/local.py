"""Text in files on this machine: Parquet, JSON Lines and plain text."""

import codecs
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekindle import storage
from rekindle.data.sources import Block, Source, SourceFile
from rekindle.data.tokenizer import END_OF_TEXT
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 8 << 20  # text handed to one encoding task: long enough to pay for its start
SAMPLE_BYTES = 1 << 16  # read from either end of a local file to recognise it again
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
COMPRESSION_RATIO = 3  # of English text under gzip or zstd, for the estimate of size


class LocalSource(Source):
    """Files of one kind on this machine."""

    revision = "local"
    licence = "unknown"  # the user's own files: only they know
    suffixes: tuple[str, ...]

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.paths = self._find([Path(path) for path in paths])
        folder = storage.spelled(self.paths[0].parent.name)
        self.name = f"{self.suffixes[0].lstrip('.') or 'text'}: {folder}"
        self.files = [
            SourceFile(path.name, path.stat().st_size, self.split_of(path)) for path in self.paths
        ]

    def split_of(self, path: Path) -> str | None:
        return None

    def _find(self, paths: list[Path]) -> list[Path]:
        """The files that `paths` name: a folder stands for those in it with a known suffix."""
        found: list[Path] = []
        for path in paths:
            if path.is_dir():
                inside = sorted(p for p in path.iterdir() if p.name.endswith(self.suffixes))
                inside = [p for p in inside if p.is_file() and not p.name.startswith(".")]
                if not inside:
                    raise UserError(f"{path} holds no {' or '.join(self.suffixes)} file")
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                raise UserError(f"there is no file or folder {path}")
        if len(set(found)) != len(found):
            raise UserError(f"a file is named twice among {', '.join(map(str, paths))}")
        return found

    @property
    def text_bytes(self) -> int:
        return sum(
            file.size * (COMPRESSION_RATIO if Path(file.name).suffix in COMPRESSION else 1)
            for file in self.files
        )

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and both ends of every file: enough to notice another data set without
        reading all of it."""
        digest = hashlib.sha256()
        for path, file in zip(self.paths, self.files, strict=True):
            digest.update(f"{file.name} {file.size}\n".encode(errors="surrogateescape"))
            with open(path, "rb") as handle:
                digest.update(handle.read(SAMPLE_BYTES))
                handle.seek(max(0, file.size - SAMPLE_BYTES))
                digest.update(handle.read(SAMPLE_BYTES))
        return digest.hexdigest()


class ParquetSource(LocalSource):
    """Parquet files with a column `text`. Files named `val*` are the validation split."""

    suffixes = (".parquet",)

    def __init__(self, paths: Iterable[Path | str]) -> None:
        super().__init__(paths)
        # With validation files in the set, every other file is training text; without, the
        # documents of all files are split by their hash.
        if any(file.split for file in self.files):
            self.files = [SourceFile(f.name, f.size, f.split or "train") for f in self.files]

    def split_of(self, path: Path) -> str | None:
        return "val" if path.name.startswith("val") else None

    @property
    def text_bytes(self) -> int:
        return sum(parquet_text_bytes(path) for path in self.paths)

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        return parquet_blocks(self.paths[file], file, skip)


def _open_parquet(path: Path) -> Any:
    """Open a Parquet file and check its column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Arrow would by default keep all that was read of a file, 2 GB of one of FineWeb's.
        opened = pq.ParquetFile(path, pre_buffer=False)
        schema = opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a whole Parquet file ({reason}): get it again") from None
    if "text" not in schema.names:
        columns = ", ".join(schema.names) or "none"
        raise UserError(f"{path} has no column 'text' (its columns: {columns})")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the column 'text' holds {kind}, not strings")
    return opened


def parquet_text_bytes(path: Path) -> int:
    """Bytes of the column `text`, from the file's metadata."""
    with _open_parquet(path) as opened:
        return _text_bytes(opened.metadata)


def _text_bytes(metadata: Any) -> int:
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return sum(
        metadata.row_group(i).column(columns.index("text")).total_uncompressed_size
        for i in range(metadata.num_row_groups)
    )


def parquet_blocks(path: Path, file: int, skip: int) -> Iterator[Block]:
    """The documents of a Parquet file. Null rows are no documents and are not counted."""
    import pyarrow as pa

    rows = first = 0  # rows read; number of the next document
    try:
        with _open_parquet(path) as opened:
            total_rows = max(1, opened.metadata.num_rows)
            # Few rows at a time: the batch size, not the row group, bounds what is in memory.
            mean = max(1, _text_bytes(opened.metadata) // total_rows)
            batch = min(max(BLOCK_BYTES // mean, 16), 1 << 16)
            for record in opened.iter_batches(batch, columns=["text"]):
                rows += len(record)
                texts = record.column(0).drop_null()
                start = min(max(skip - first, 0), len(texts))
                for part in _parts(texts.slice(start)):
                    part.validate(full=True)  # Parquet does not promise UTF-8; the tokenizer does
                    yield Block(part, file, first + start, rows / total_rows)
                    start += len(part)
                first += len(texts)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged near row {rows} ({reason}): get it again") from None


def _parts(texts: Any) -> Iterator["pa.StringArray"]:
    """Cut an array of strings, plain or large, into plain ones of about `BLOCK_BYTES`."""
    import pyarrow as pa

    if len(texts) > 1 and texts.nbytes > 2 * BLOCK_BYTES:
        middle = len(texts) // 2
        yield from _parts(texts.slice(0, middle))
        yield from _parts(texts.slice(middle))
    elif len(texts):
        yield texts.cast(pa.string())


class JsonLinesSource(LocalSource):
    """Files of one JSON object a line with the field `text`; gzip and zstd are read as they are."""

    suffixes = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        documents = self._documents(self.paths[file], self.files[file].size)
        return _gather(documents, file, skip)

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


class TextSource(LocalSource):
    """Plain UTF-8 text: a file is one document, or several with `<|endoftext|>` between them.

    Newlines beside a separator belong to it; all other text is taken as it is.
    """

    suffixes = (".txt", ".md", ".text")

    def blocks(self, file: int, skip: int = 0) -> Iterator[Block]:
        documents = self._documents(self.paths[file], self.files[file].size)
        return _gather(documents, file, skip)

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
        while chunk := file.read(BLOCK_BYTES):
            buffer += chunk
            while (found := buffer.find(separator, searched)) >= 0:
                yield bytes(buffer[:found]), start
                del buffer[: found + len(separator)]
                start += found + len(separator)
                searched = 0
            searched = max(0, len(buffer) - len(separator) + 1)
    yield bytes(buffer), start


def _gather(documents: Iterable[tuple[bytes, float]], file: int, skip: int) -> Iterator[Block]:
    """Blocks from single documents, each with the part of the file read so far."""
    import pyarrow as pa

    texts: list[bytes] = []
    size, done, number = 0, 0.0, 0
    for number, (text, done) in enumerate(documents, 1):
        if number <= skip:
            continue
        texts.append(text)
        size += len(text)
        if size >= BLOCK_BYTES:
            yield Block(pa.array(texts, pa.string()), file, number - len(texts), done)
            texts, size = [], 0
    if texts:
        yield Block(pa.array(texts, pa.string()), file, number - len(texts), done)
