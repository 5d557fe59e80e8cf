"""Every file that is found is either read or reported in one line."""

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


def output_of(source: Any, out: Path) -> str:
    output: list[str] = []
    prepare(source, out, "bytes", console=listen(output))
    return "\n".join(output)


@pytest.mark.parametrize("kind", KINDS)
def test_subfolders_and_upper_case_suffixes_are_included(
    tmp_path: Path, write: Callable, kind: str
) -> None:
    suffix = KINDS[kind]
    names = [f"b{suffix}", f"C{suffix.upper()}", f"a/x{suffix}", f"a/deep/y{suffix.title()}"]
    for name in names:
        write(tmp_path / name, name)
    source = source_of(kind, [tmp_path])
    assert documents(source) == [file.name for file in source.files]
    assert sorted(documents(source)) == sorted(names)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_left_out_are_listed(tmp_path: Path, write: Callable, kind: str) -> None:
    write(tmp_path / "in" / f"a{KINDS[kind]}")
    for name in ("notes.csv", "_SUCCESS", "._a.parquet", ".hidden/b.jsonl", "sub/picture.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    output = output_of(source_of(kind, [tmp_path / "in"]), tmp_path / "out")
    lines = [line for line in output.splitlines() if "notes.csv" in line]
    assert len(lines) == 1
    for name in ("_SUCCESS", "._a.parquet", ".hidden/", "sub/picture.png"):
        assert name in output


@pytest.mark.parametrize("kind", KINDS)
def test_broken_link_is_an_error(tmp_path: Path, write: Callable, kind: str) -> None:
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
    """The file is read once, under the name that is not a link; the other name is reported."""
    folder = tmp_path / "in"
    file = write(folder / f"b{KINDS[kind]}", "once")
    make(file, folder / f"a{KINDS[kind]}")
    source = source_of(kind, [folder])
    assert documents(source) == ["once"]
    if make is os.symlink:
        assert [f.name for f in source.files] == [file.name]
    output = output_of(source, tmp_path / "out")
    assert f"a{KINDS[kind]}" in output
    assert "same file" in output


def test_linked_folders_are_read_once(tmp_path: Path, write: Callable) -> None:
    """Links to folders are followed, cycles end, and no file is read twice."""
    write(tmp_path / "elsewhere" / "a.txt", "once")
    (tmp_path / "in").mkdir()
    for name in ("x", "y"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert documents(source_of("text", [tmp_path / "in"])) == ["once"]


def test_file_given_twice(tmp_path: Path, write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for other in ("in/a.txt", "in/../in/a.txt", "link", "link/a.txt"):
        with pytest.raises(UserError, match=r"a\.txt.*given twice|given twice.*a\.txt"):
            source_of("text", [tmp_path / "in", Path(other)])


def test_folder_without_matching_files_lists_what_it_contains(tmp_path: Path) -> None:
    for name in ("a.json.gz", "b.csv"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"contains no \.jsonl.*a\.json\.gz, b\.csv"):
        source_of("jsonl", [tmp_path])


@pytest.mark.parametrize("kind", KINDS)
def test_pipe_is_rejected(tmp_path: Path, write: Callable, kind: str) -> None:
    os.mkfifo(tmp_path / f"pipe{KINDS[kind]}")
    with pytest.raises(UserError, match=r"pipe\.\w+ is a pipe.*save it to a file"):
        source_of(kind, [tmp_path / f"pipe{KINDS[kind]}"])
    write(tmp_path / f"a{KINDS[kind]}")
    with pytest.raises(UserError, match=r"pipe\.\w+ is a pipe"):
        source_of(kind, [tmp_path])
