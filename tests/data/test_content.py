"""A file of the wrong type is identified by its content, and the error names the type."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rekindle.data.shards import open_shard
from rekindle.errors import UserError
from tests.data.naming import source_of

LINES = "".join(json.dumps({"text": f"Line number {i}."}) + "\n" for i in range(300)).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 1234\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"


def documents(kind: str, path: Path) -> list[str]:
    source: Any = source_of(kind, [path])
    return [text for block in source.blocks(0) for text in block.texts.to_pylist()]


def read_error(kind: str, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        documents(kind, path)
    assert str(path) in str(caught.value)
    assert "remove the line" not in str(caught.value)
    return str(caught.value)


def zipped(content: bytes) -> bytes:
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        archive.writestr("a.jsonl", content)
    return packed.getvalue()


def tarred(content: bytes) -> bytes:
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as archive:
        (entry := tarfile.TarInfo("a.jsonl")).size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


PACKED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "gzip"), "zstd": (zstd, "Zstandard"), "bzip2": (bz2.compress, "bzip2"),
    "xz": (lzma.compress, "xz"), "zip": (zipped, "ZIP"), "tar": (tarred, "tar"),
    "tar.gz": (lambda content: gzip.compress(tarred(content)), "gzip|tar"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_compressed_under_any_suffix(tmp_path: Path, kind: str, name: str) -> None:
    """The file is decompressed if possible; otherwise the error names its format."""
    pack, called = PACKED[name]
    for suffix in (".txt", ".jsonl", ".GZ", ".parquet", ".jsonl.zst"):
        (path := tmp_path / f"a{suffix}").write_bytes(pack(LINES))
        if kind == "jsonl" and name in ("gzip", "zstd"):
            assert documents(kind, path) == [f"Line number {i}." for i in range(300)]
            continue
        message = read_error(kind, path)
        assert any(f"{one} " in message for one in called.split("|")), message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "b.jsonl.gz"])
def test_compression_suffix_on_an_uncompressed_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    assert len(documents("jsonl", tmp_path / name)) == 300


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_git_lfs_pointer(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    assert "Git LFS pointer" in read_error(kind, tmp_path / name)
    assert "git lfs pull" in read_error(kind, tmp_path / name)


def test_git_lfs_pointer_in_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "train_0.bin").write_bytes(POINTER + b"\n" * 2000)
    with pytest.raises(UserError, match=r"train_0\.bin is a Git LFS pointer.*git lfs pull"):
        open_shard(tmp_path / "train_0.bin")


@pytest.mark.parametrize("page", [PAGE, b"\n  <html>\n" * 9, b"<?xml version='1.0'?><Error/>" * 5])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_saved_error_page(tmp_path: Path, kind: str, page: bytes) -> None:
    (tmp_path / f"a.{kind}").write_bytes(page)
    message = read_error(kind, tmp_path / f"a.{kind}")
    assert "page" in message
    assert "download" in message


def test_web_page_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_bytes(PAGE)
    assert documents("text", tmp_path / "page.txt") == [PAGE.decode()]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_wide_encodings(tmp_path: Path, kind: str, encoding: str) -> None:
    """As written by Windows editors or PowerShell. Without a byte order mark, ASCII text would be
    valid UTF-8 full of NULs."""
    (tmp_path / "a").write_bytes(LINES.decode().encode(encoding))
    message = read_error(kind, tmp_path / "a")
    assert encoding[:6].upper() in message
    assert "iconv" in message


ARRAYS = {
    "array": json.dumps([{"text": "One."}, {"text": "Two."}]),
    "array of lines": '[\n{"text": "One."},\n{"text": "Two."}\n]\n',
    "indented array": json.dumps([{"text": "One."}], indent=1),
    "array of strings": '["One.", "Two."]',
}
INDENTED = {
    "indented": json.dumps({"text": "One."}, indent=2),
    "several": json.dumps({"text": "One."}, indent=2) + "\n" + json.dumps({"text": "2"}, indent=2),
    "after a line": '\n{"text":\n"One."}\n',
    "after lines": '{"text": "One."}\n' + json.dumps({"text": "One."}, indent=4),
}


@pytest.mark.parametrize("name", [*ARRAYS, *INDENTED])
def test_json_that_is_not_json_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.json").write_text((ARRAYS | INDENTED)[name])
    message = read_error("jsonl", tmp_path / "a.json")
    assert ("JSON array" if name in ARRAYS else "spans several lines") in message
    assert "jq -c" in message


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_truncated_archive(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """The error names the last line that could be read."""
    whole = pack(LINES)
    for keep in (len(whole) - 1, len(whole) - 12, len(whole) // 2, 30):
        (tmp_path / "a.jsonl.gz").write_bytes(whole[:keep])
        message = read_error("jsonl", tmp_path / "a.jsonl.gz")
        assert "is truncated or damaged after line" in message
        line = int(message.split("after line ")[1].split()[0])
        assert line == 300 if keep > len(whole) - 5 and pack is gzip.compress else line <= 300
    flipped = bytearray(whole)
    flipped[-6] ^= 255
    (tmp_path / "a.jsonl.gz").write_bytes(flipped)
    assert "is truncated or damaged after line" in read_error("jsonl", tmp_path / "a.jsonl.gz")


def test_lines_before_the_end_of_a_truncated_archive_are_read(tmp_path: Path) -> None:
    """Also with Zstandard, except for the lines in its last block."""
    rng = random.Random(0)
    whole = zstd(
        b"".join(b'{"text": "%b"}\n' % rng.randbytes(5000).hex().encode() for _ in range(300))
    )
    (tmp_path / "a.jsonl").write_bytes(whole[:-12])
    message = read_error("jsonl", tmp_path / "a.jsonl")
    assert 270 < int(message.split("after line ")[1].split()[0]) < 300


@pytest.mark.parametrize("cut", [4, 100, -1, -8])
def test_truncated_parquet(tmp_path: Path, as_parquet: Callable, cut: int) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet([f"text {i}" for i in range(500)])[:cut])
    assert "is not a complete Parquet file" in read_error("parquet", tmp_path / "a.parquet")


def test_parquet_given_as_another_kind(tmp_path: Path, as_parquet: Callable) -> None:
    (tmp_path / "a").write_bytes(as_parquet(["text"]))
    for kind in ("text", "jsonl"):
        assert "is a Parquet file: use --parquet" in read_error(kind, tmp_path / "a")


HARD = {
    "deep": ('{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "deep objects": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
    "open": ("[" * 100_000, "nested too deeply"),
    "half a pair": ('{"text": "half \\ud83d"}', "not valid Unicode"),
    "fields": ('{"id": 3, "content": "x"}', r"string field 'text' \(its fields: 'id', 'content'\)"),
    "key": ('{"\\udc00": 1, "text": 3}', "string field 'text'"),
}


@pytest.mark.parametrize("name", HARD)
def test_parser_errors_are_one_line(tmp_path: Path, name: str) -> None:
    line, problem = HARD[name]
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2 contains .*{problem}"):
        documents("jsonl", tmp_path / "a.jsonl")


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "9" * 100_000, "1" * 5000 + ".5e99999"])
def test_huge_numbers_in_other_fields_are_accepted(tmp_path: Path, number: str) -> None:
    line = f'{{"text": "fine", "number": {number}}}\n{{"text": "too", "n": [{number}1]}}\n'
    (tmp_path / "a.jsonl").write_text(line)
    assert documents("jsonl", tmp_path / "a.jsonl") == ["fine", "too"]
    (tmp_path / "b.jsonl").write_text(f'{{"text": {"1" * 5000}}}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:1 contains no JSON object with a string field"):
        documents("jsonl", tmp_path / "b.jsonl")
