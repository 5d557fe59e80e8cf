"""Each kind of source yields all its documents, from any position, and reports bad input."""

import gzip
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data import sources
from rekindle.data.sources import from_arguments, local
from rekindle.data.sources.base import Source
from rekindle.data.sources.ready_made import ReadyMade
from rekindle.errors import UserError


def documents(source: Source, file: int = 0, skip: int = 0) -> list[str]:
    """The documents of one file; also checks the fields of every block."""
    found: list[str] = []
    done = 0.0
    for block in source.blocks(file, skip):
        assert block.file == file
        assert block.first == skip + len(found)
        assert block.texts.null_count == 0
        assert len(block.texts) > 0
        assert done <= block.done <= 1.0
        done = block.done
        found += block.texts.to_pylist()
    return found


def all_documents(source: Source) -> list[str]:
    return [text for file in range(len(source.files)) for text in documents(source, file)]


def local_source(**arguments: object) -> Source:
    source = from_arguments(**arguments)  # type: ignore[arg-type]
    assert not isinstance(source, ReadyMade)
    return source


# Parquet


def test_parquet_yields_every_document_in_order(
    parquet: Callable[..., Path], texts: Callable[..., list[str]]
) -> None:
    first, second = texts(150, seed=1), texts(90, seed=2)
    parquet("b.parquet", second)
    source = local_source(parquet=[parquet("a.parquet", first)])
    assert [file.name for file in source.files] == ["a.parquet", "b.parquet"]
    assert all_documents(source) == first + second
    assert source.text_bytes > 0


@pytest.mark.parametrize("skip", [0, 1, 63, 64, 65, 149, 150])
def test_parquet_resumes_from_any_document(
    parquet: Callable[..., Path], texts: Callable[..., list[str]], skip: int
) -> None:
    expected = [None if i % 5 == 0 else text for i, text in enumerate(texts(150))]
    source = local_source(parquet=[parquet("a.parquet", expected)])
    assert documents(source, skip=skip) == [text for text in expected if text is not None][skip:]


def test_blocks_stay_small(parquet: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither large row groups nor large documents lead to large blocks."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 10_000)
    expected = ["x" * (10 if i < 500 else 3000) + str(i) for i in range(600)]
    source = local_source(parquet=[parquet("a.parquet", expected, row_group=1000)])
    blocks = [block.texts for block in source.blocks(0)]
    assert [text for block in blocks for text in block.to_pylist()] == expected
    assert max(sum(map(len, block.to_pylist())) for block in blocks) <= 20_000
    first = next(iter(source.blocks(0)))  # only a few rows are read at a time
    assert first.done == len(first.texts) / 600 < 0.1
    for skip in (1, 499, 517):
        assert documents(source, skip=skip) == expected[skip:]


def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, Arrow keeps everything it has read: 2 GB for one file of FineWeb."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 200_000)
    rng = random.Random(0)
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"text": pa.string()})) as writer:
        for _ in range(40):
            texts = [rng.randbytes(2500).hex() for _ in range(100)]
            writer.write_table(pa.table({"text": texts}))
    source = local_source(parquet=[tmp_path])
    assert source.text_bytes > 10_000_000
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in source.blocks(0)) < 3_000_000


def test_val_files_are_validation(parquet: Callable[..., Path]) -> None:
    folder = parquet("train_0.parquet", ["a"])
    assert [file.split for file in local_source(parquet=[folder]).files] == [None]
    parquet("val_0.parquet", ["b"])
    assert [file.split for file in local_source(parquet=[folder]).files] == ["train", "val"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_string_columns_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", None, "zwei 東京", ""]
    table = pa.table({"id": [1, 2, 3, 4], "text": pa.array(texts, pa.string()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert documents(local_source(parquet=[tmp_path / "a.parquet"])) == ["one", "zwei 東京", ""]


def test_parquet_without_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    source = local_source(parquet=[tmp_path])
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text'.*content, id"):
        documents(source)
    pq.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="contains int64, not strings"):
        documents(local_source(parquet=[tmp_path]))


@pytest.mark.parametrize("damage", ["empty", "truncated", "no parquet", "page"])
def test_damaged_parquet(
    parquet: Callable[..., Path], texts: Callable[..., list[str]], damage: str
) -> None:
    path = parquet("a.parquet", texts(400)) / "a.parquet"
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[: len(content) // 2],
            "no parquet": b"hello " * 100,
            "page": content[:20] + bytes(2000) + content[2020:],
        }[damage]
    )
    with pytest.raises(UserError, match=r"a\.parquet") as caught:
        documents(local_source(parquet=[path]))
    assert "\n" not in str(caught.value)


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    binary = pa.array([b"good", b"bad \xff"], pa.binary())
    pq.write_table(pa.table({"text": binary.view(pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is damaged near row.*UTF8"):
        documents(local_source(parquet=[tmp_path]))


# JSON Lines


def jsonl(path: Path, lines: list[str]) -> Path:
    content = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, "zstd", asbytes=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl(
    tmp_path: Path,
    texts: Callable[..., list[str]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "BLOCK_BYTES", 3000)
    expected = texts(200)
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(expected)]
    lines[50:50] = ["", '{"text": null}']  # these are not documents
    source = local_source(jsonl=[jsonl(tmp_path / name, lines)])
    assert documents(source) == expected
    assert documents(source, skip=77) == expected[77:]
    assert documents(source, skip=200) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops", "invalid JSON"),
        ('{"content": "x"}', "string field 'text'"),
        ('{"text": 3}', "string field 'text'"),
        ('["text"]', "string field 'text'"),
        ("3", "string field 'text'"),
        ('{"text": "\\ud800"}', "not valid Unicode"),
        ('{"text": "\ud800"}', "not valid Unicode"),
    ],
)
def test_bad_line_is_reported(tmp_path: Path, line: str, problem: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", ['{"text": "fine"}', "", line])
    with pytest.raises(UserError, match=rf"a\.jsonl:3 contains.*{problem}") as caught:
        documents(local_source(jsonl=[path]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_compression(tmp_path: Path, texts: Callable[..., list[str]], name: str) -> None:
    path = jsonl(tmp_path / name, [json.dumps({"text": text}) for text in texts(500)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a\.jsonl"):
        documents(local_source(jsonl=[path]))


# Plain text


def test_text_file_is_one_unchanged_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one \r\n two\n\n")  # with a byte order mark
    assert documents(local_source(text=[tmp_path / "a.txt"])) == [" one \r\n two\n\n"]


@pytest.mark.parametrize("size", [1, 5, 14, 1 << 20])
def test_separators_split_a_text_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """For any size of the chunks that are read."""
    monkeypatch.setattr(local, "BLOCK_BYTES", size)
    text = "first\n<|endoftext|>\n sécond \n<|endoftext|><|endoftext|>\n\n<|endoftext|>third\n"
    (tmp_path / "a.txt").write_text(text)
    source = local_source(text=[tmp_path / "a.txt"])
    assert documents(source) == ["first", " sécond ", "third\n"]
    assert documents(source, skip=2) == ["third\n"]


def test_text_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good<|endoftext|>caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text \(byte 20"):
        documents(local_source(text=[path]))


def test_size_estimate_counts_compressed_files_threefold(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    (tmp_path / "b.jsonl.gz").write_bytes(packed := gzip.compress(line))
    (tmp_path / "c.txt").write_bytes(b"plain")
    source = local_source(jsonl=[tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])
    assert source.text_bytes == len(line) + 3 * len(packed)
    assert local_source(text=[tmp_path / "c.txt"]).text_bytes == 5


# The embedded default


def test_embedded_text_is_the_python_documentation() -> None:
    source = local_source(embedded=True)
    found = documents(source)
    assert source.licence == "PSF-2.0"
    assert source.revision.count(".") == 2
    assert len(found) > 100
    assert 500_000 < source.text_bytes < 20_000_000
    assert any("json" in text and text.startswith("module json\n") for text in found)
    assert documents(source, skip=7) == found[7:]


def test_embedded_text_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested on one package, because parsing the whole library takes seconds."""
    library = Path(sysconfig.get_path("stdlib"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library / "json"))
    first, second = (local_source(embedded=True) for _ in range(2))
    assert any(text.startswith("module decoder\n") for text in documents(first))
    assert first.fingerprint == second.fingerprint


# Naming a source


def test_exactly_one_source_must_be_given(tmp_path: Path) -> None:
    for arguments in ({}, {"embedded": True, "dataset": "fineweb-10bt"}, {"parquet": []}):
        with pytest.raises(UserError, match="exactly one source"):
            from_arguments(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fineweb-edu", "fineweb-edu-10bt"),
        ("fineweb10bt", "fineweb-10bt"),
        ("fineweb-10bt-tokenised", "fineweb-10bt-tokenized"),
        ("xyz", "fineweb-edu-10bt"),
    ],
)
def test_unknown_dataset_suggests_similar_names(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown dataset '{name}': did you mean .*{meant}"):
        from_arguments(dataset=name)


def options(kind: str, path: Path) -> dict[str, Any]:
    return {kind: [path]}


def test_missing_source_is_reported(tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl", "text"):
        with pytest.raises(UserError, match=r"there is no file or folder .*nowhere"):
            from_arguments(**options(kind, tmp_path / "nowhere"))
        with pytest.raises(UserError, match="contains no "):
            from_arguments(**options(kind, tmp_path))
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        from_arguments(shards=tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="given twice"):
        from_arguments(text=[tmp_path, tmp_path / "a.txt"])


def test_fingerprint_depends_on_names_and_content(tmp_path: Path) -> None:
    def fingerprint(name: str, content: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_text(content)
        return local_source(text=[folder]).fingerprint

    assert fingerprint("a.txt", "one") == fingerprint("a.txt", "one")  # in different folders
    same = {fingerprint("a.txt", "one"), fingerprint("b.txt", "one"), fingerprint("a.txt", "two")}
    assert len(same) == 3


def test_importing_sources_is_fast() -> None:
    """PyArrow is not imported before it is used, so that `rekindle --help` stays fast."""
    assert not hasattr(sources, "pa")
