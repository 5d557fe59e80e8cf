"""Parquet files with a `text` column."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rekindle.data import content
from rekindle.data.sources import local
from rekindle.data.sources.base import Block
from rekindle.data.sources.local import LocalSource, Piece, parts
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ROWS = 256  # read at once, because their decoded size is not known beforehand
MOST_INDICES = 1 << 16  # rows read at once of a dictionary column, which is decoded in steps


class ParquetSource(LocalSource):
    """Parquet files with a `text` column."""

    suffixes = (".parquet",)

    @property
    def text_bytes(self) -> int:
        return sum(parquet_text_bytes(path) for path in self.paths)

    def read(self, file: int, skip: int) -> Iterator[Block]:
        return parquet_blocks(self.paths[file], file, skip)


def _open_parquet(path: Path) -> Any:
    """Open a Parquet file and check its `text` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default Arrow keeps all data read from a file in memory, 2 GB for a FineWeb file.
        opened = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        schema = opened.schema_arrow
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        kind = content.kind_of(content.head_of(path))
        if kind and kind != content.PARQUET:
            raise UserError(f"{path} is {content.describe(kind)}") from None
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a complete Parquet file ({reason}): download it again"
        ) from None
    columns = ", ".join(schema.names) or "none"
    if (count := schema.names.count("text")) != 1:
        wrong = f"has {count} columns 'text'" if count else "has no column 'text'"
        raise UserError(
            f"{path} {wrong} (its columns: {columns}): put the text in one column named 'text'"
        )
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(f"{path}: the column 'text' contains {kind}, not strings: convert it")
    return opened


def parquet_text_bytes(path: Path) -> int:
    """Bytes of the `text` column, from the file's metadata."""
    with _open_parquet(path) as opened:
        groups = range(opened.metadata.num_row_groups)
        return sum(_group_bytes(opened.metadata, group) for group in groups)


def _group_bytes(metadata: Any, group: int) -> int:
    """Encoded but uncompressed bytes of the `text` column in one row group."""
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return metadata.row_group(group).column(columns.index("text")).total_uncompressed_size


def parquet_blocks(path: Path, file: int, skip: int) -> Iterator[Block]:
    """Yield the documents of a Parquet file. Null rows are not documents and are not counted."""
    import pyarrow as pa

    rows = first = 0  # rows read; number of the next document
    waiting: list[pa.StringArray] = []  # texts of the next block, which ends before `first`
    try:
        with _open_parquet(path) as opened:
            total_rows = max(1, opened.metadata.num_rows)
            for column, enough in _columns(opened):
                rows += len(column)
                texts = column.drop_null()
                start = min(max(skip - first, 0), len(texts))
                first += start
                for array in _decoded(texts.slice(start)):
                    array.validate(full=True)  # Parquet does not guarantee UTF-8
                    waiting.append(array)
                    first += len(array)
                    if _is_full(waiting, enough):
                        yield from _blocks(waiting, file, first, rows / total_rows)
                        waiting = []
            if waiting:
                yield from _blocks(waiting, file, first, 1.0)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is damaged near row {rows} ({reason}): download it again"
        ) from None


def _columns(opened: Any) -> Iterator[tuple[Any, int]]:
    """Yield the `text` column a few rows at a time, and the number of rows for a full block. The
    rows read at once, not the size of a row group, bound the memory in use."""
    import pyarrow as pa

    is_dictionary = pa.types.is_dictionary(opened.schema_arrow.field("text").type)
    most = MOST_INDICES if is_dictionary else MOST_ROWS
    for group in range(opened.metadata.num_row_groups):
        count = max(1, opened.metadata.row_group(group).num_rows)
        mean = max(1, _group_bytes(opened.metadata, group) // count)
        enough = min(max(local.BLOCK_BYTES // mean, 1), 1 << 16)
        batch = most if is_dictionary else min(enough, most)
        for record in opened.iter_batches(batch, row_groups=[group], columns=["text"]):
            column = record.column(0)
            is_view = column.type == pa.string_view()
            yield column.cast(pa.large_string()) if is_view else column, enough


def _decoded(texts: Any) -> Iterator["pa.StringArray"]:
    """Convert any string type to plain strings, in arrays of at most `BLOCK_BYTES` or of one
    string."""
    import pyarrow as pa
    from pyarrow import compute

    if pa.types.is_dictionary(texts.type):
        lengths = compute.call_function("binary_length", [texts.dictionary])
        lengths = lengths.take(texts.indices)
    else:
        lengths = compute.call_function("binary_length", [texts])
    ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    start = 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        end = int(np.searchsorted(ends, before + local.BLOCK_BYTES, side="right"))
        end = max(end, start + 1)
        array = texts.slice(start, end - start)
        array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
        yield array.cast(pa.string())
        start = end


def _is_full(waiting: list["pa.StringArray"], enough: int) -> bool:
    rows, size = sum(map(len, waiting)), sum(array.nbytes for array in waiting)
    return rows >= enough or size >= local.BLOCK_BYTES


def _blocks(waiting: list["pa.StringArray"], file: int, end: int, done: float) -> Iterator[Block]:
    """Yield the documents before number `end` as one block, and long ones in parts."""
    import pyarrow as pa

    short: list[pa.StringArray] = []
    number = end - sum(map(len, waiting))
    for array in waiting:
        if len(array) == 1 and array.nbytes > local.PART_BYTES:
            if short:
                count = sum(map(len, short))
                yield Block(pa.concat_arrays(short), file, number - count, done)
                short = []
            text = array[0].as_buffer().to_pybytes()
            yield from parts(Piece(text, done), file, number)
        else:
            short.append(array)
        number += len(array)
    if short:
        yield Block(pa.concat_arrays(short), file, number - sum(map(len, short)), done)
