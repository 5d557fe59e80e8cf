"""Every file that is found is taken, or named in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.data.prepare import prepare
from rekindle.errors import UserError
from tests.data.listening import listen
from tests.data.naming import source_of

KINDS = {"jsonl": ".jsonl", "text": ".txt", "parquet": ".parquet"}


@pytest.fixture
def write(as_parquet: Callable[..., bytes]) -> Callable[..., Path]:
    def one(path: Path, text: str = "A text.") -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            path.write_bytes(as_parquet([text]))
        else:
            line = json.dumps({"text": text}) + "\n"
            path.write_text(line if path.suffix.lower() == ".jsonl" else text)
        return path

    return one


def documents(source: Any) -> list[str]:
    files = range(len(source.files))
    return [text for i in files for b in source.blocks(i) for text in b.texts.to_pylist()]


def said_of(source: Any, out: Path) -> str:
    said: list[str] = []
    prepare(source, out, "bytes", console=listen(said))
    return "\n".join(said)


@pytest.mark.parametrize("kind", KINDS)
def test_subfolders_and_upper_case_count(tmp_path: Path, write: Callable, kind: str) -> None:
    suffix = KINDS[kind]
    names = [f"b{suffix}", f"C{suffix.upper()}", f"a/x{suffix}", f"a/deep/y{suffix.title()}"]
    for name in names:
        write(tmp_path / name, name)
    source = source_of(kind, [tmp_path])
    assert documents(source) == [file.name for file in source.files]
    assert sorted(documents(source)) == sorted(names)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_taken_is_named(tmp_path: Path, write: Callable, kind: str) -> None:
    write(tmp_path / "in" / f"a{KINDS[kind]}")
    for name in ("notes.csv", "_SUCCESS", "._a.parquet", ".hidden/b.jsonl", "sub/picture.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    said = said_of(source_of(kind, [tmp_path / "in"]), tmp_path / "out")
    lines = [line for line in said.splitlines() if "notes.csv" in line]
    assert len(lines) == 1
    for name in ("_SUCCESS", "._a.parquet", ".hidden/", "sub/picture.png"):
        assert name in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_link_is_an_error(tmp_path: Path, write: Callable, kind: str) -> None:
    write(tmp_path / f"a{KINDS[kind]}")
    for link in (f"b{KINDS[kind]}", "sub/c"):
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to("/nowhere/b")
        for named in ([tmp_path], [tmp_path / link]):
            with pytest.raises(UserError, match=rf"{Path(link).name}.* link .*nowhere"):
                source_of(kind, named)
        (tmp_path / link).unlink()


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_file_under_two_names(tmp_path: Path, write: Callable, kind: str, make: Any) -> None:
    """Taken once, under the name that is no link; the other one is named."""
    folder = tmp_path / "in"
    file = write(folder / f"b{KINDS[kind]}", "once")
    make(file, folder / f"a{KINDS[kind]}")
    source = source_of(kind, [folder])
    assert documents(source) == ["once"]
    if make is os.symlink:
        assert [f.name for f in source.files] == [file.name]
    said = said_of(source, tmp_path / "out")
    assert f"a{KINDS[kind]}" in said
    assert "same file" in said


def test_linked_folders(tmp_path: Path, write: Callable) -> None:
    """A link to a folder is followed, a circle ends, and nothing is taken twice."""
    write(tmp_path / "elsewhere" / "a.txt", "once")
    (tmp_path / "in").mkdir()
    for name in ("x", "y"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert documents(source_of("text", [tmp_path / "in"])) == ["once"]


def test_one_file_named_twice(
    tmp_path: Path, write: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in" / "a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for other in ("in/a.txt", "in/../in/a.txt", "link", "link/a.txt"):
        with pytest.raises(UserError, match=r"a\.txt.*named twice|named twice.*a\.txt"):
            source_of("text", [tmp_path / "in", Path(other)])


def test_a_folder_of_other_files_says_what_there_is(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"holds no \.jsonl.*a\.json\.gz, b\.csv"):
        source_of("jsonl", [tmp_path])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_is_called_one(tmp_path: Path, write: Callable, kind: str) -> None:
    os.mkfifo(tmp_path / f"pipe{KINDS[kind]}")
    with pytest.raises(UserError, match=r"pipe\.\w+ is a pipe.*save it to a file"):
        source_of(kind, [tmp_path / f"pipe{KINDS[kind]}"])
    write(tmp_path / f"a{KINDS[kind]}")
    with pytest.raises(UserError, match=r"pipe\.\w+ is a pipe"):
        source_of(kind, [tmp_path])
