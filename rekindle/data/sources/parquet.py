"""Parquet files with a column `text`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekindle.data.sources import local
from rekindle.data.sources.base import Block, splits_of
from rekindle.data.sources.local import LocalSource
from rekindle.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


class ParquetSource(LocalSource):
    """Parquet files with a column `text`. Files named `val*` are the validation split."""

    suffixes = (".parquet",)

    def splits(self) -> list[str | None]:
        return splits_of([path.name for path in self.paths])

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
            batch = min(max(local.BLOCK_BYTES // mean, 16), 1 << 16)
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

    if len(texts) > 1 and texts.nbytes > 2 * local.BLOCK_BYTES:
        middle = len(texts) // 2
        yield from _parts(texts.slice(0, middle))
        yield from _parts(texts.slice(middle))
    elif len(texts):
        yield texts.cast(pa.string())
