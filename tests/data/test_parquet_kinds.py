"""Parquet files as written by current programs."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data.sources import from_arguments, local
from rekindle.errors import UserError

TEXTS = ["one", None, "zwei 東京", "", "one", "three " * 50, None, "🙂"]


def documents(path: Path, skip: int = 0) -> list[str]:
    source: Any = from_arguments(parquet=[path])
    found: list[str] = []
    for block in source.blocks(0, skip):
        assert block.texts.type == pa.string()
        found += block.texts.to_pylist()
    return found


def dictionary(values: pa.DataType, index: pa.DataType) -> pa.Array:
    kept = [text for text in dict.fromkeys(TEXTS) if text is not None]
    indices = [None if text is None else kept.index(text) for text in TEXTS]
    return pa.DictionaryArray.from_arrays(pa.array(indices, index), pa.array(kept, values))


COLUMNS = {
    "view": pa.array(TEXTS, pa.string_view()),
    "large": pa.array(TEXTS, pa.large_string()),
    "category": dictionary(pa.string(), pa.int8()),
    "large category": dictionary(pa.large_string(), pa.int32()),
    "chunks": pa.chunked_array([TEXTS[:3], [], TEXTS[3:]], pa.string()),
    "chunks of views": pa.chunked_array([TEXTS[:3], TEXTS[3:]], pa.string_view()),
}


@pytest.mark.parametrize("kind", ["view", "chunks of views"])
def test_string_views(tmp_path: Path, kind: str) -> None:
    every_kind_of_string_column(tmp_path, kind)


@pytest.mark.parametrize("kind", ["large", "category", "large category", "chunks"])
def test_other_strings(tmp_path: Path, kind: str) -> None:
    every_kind_of_string_column(tmp_path, kind)


def every_kind_of_string_column(tmp_path: Path, kind: str) -> None:
    expected = [text for text in TEXTS if text is not None]
    for size in (1, 3, 100):
        options: list[dict[str, Any]] = [
            {},
            {"use_dictionary": False},
            {"data_page_version": "2.0"},
        ]
        for more in options:
            table = pa.table({"id": range(len(TEXTS)), "text": COLUMNS[kind]})
            pq.write_table(table, tmp_path / "a.parquet", row_group_size=size, **more)
            for skip in (0, 1, 4, 6):
                assert documents(tmp_path / "a.parquet", skip) == expected[skip:]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_dictionary_column_is_decoded_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    """Not document by document, which would be many times slower than plain text."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 100_000)
    texts = [f"{i} " * 300 for i in range(3000)]
    column = pa.DictionaryArray.from_arrays(pa.array(range(3000), pa.int32()), pa.array(texts))
    if kind == pa.string_view():
        column = pa.array(texts, kind)
    elif kind == pa.large_string():
        column = column.cast(pa.dictionary(pa.int32(), kind))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    source: Any = from_arguments(parquet=[tmp_path / "a.parquet"])
    blocks = [block.texts for block in source.blocks(0)]
    assert [text for block in blocks for text in block.to_pylist()] == texts
    assert len(blocks) < 1.5 * sum(map(len, texts)) / 100_000


@pytest.mark.parametrize("names", [["text", "text"], ["text", "id", "text"], ["text"] * 3])
def test_duplicate_text_columns(tmp_path: Path, names: list[str]) -> None:
    columns = [pa.array([f"{i}"]) for i in range(len(names))]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet has {names.count('text')} columns 'text'"):
        documents(tmp_path / "a.parquet")


def test_nested_text_field_is_ignored(tmp_path: Path) -> None:
    table = pa.table({"meta": [{"text": "inner"}], "text": ["outer"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["outer"]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_checksums_of_pages_are_verified(tmp_path: Path, compression: str) -> None:
    """Detects a changed bit that would still decode."""
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["A plain sentence in which a letter can change unseen."] * 3})
    pq.write_table(
        table,
        path,
        compression=compression,
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
    )
    content = path.read_bytes()
    at = content.index(b"plain")
    path.write_bytes(content[:at] + b"P" + content[at + 1 :])
    with pytest.raises(UserError, match=r"a\.parquet is damaged near row 0"):
        documents(path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.int64(), pa.list_(pa.string())], ids=str)
def test_columns_that_are_not_text_are_rejected(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array([], kind)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"the column 'text' contains .*, not strings"):
        documents(tmp_path / "a.parquet")
