"""`rekindle train RECIPE --text FILE`: prepare, hold out a tail, train."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle import storage
from rekindle.data.shards import open_split, read_manifest

TEXT = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog.\n" for i in range(300))


@pytest.fixture
def arguments(tmp_path: Path, tiny_flags: list[str]) -> list[str]:
    (tmp_path / "my.txt").write_text(TEXT)
    where = ["--text", str(tmp_path / "my.txt"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    return ["train", "demo", *where, "--no-compile", *tiny_flags, "--steps", "4"]


def test_training_on_a_text_file(
    tmp_path: Path, arguments: list[str], rekindle: Callable, one_thread: None
) -> None:
    outcome = rekindle(*arguments, "--eval-tokens", 500)
    assert outcome.status == 0, outcome.err
    data = tmp_path / "run" / "data"
    manifest = read_manifest(data)
    assert (manifest.tokenizer, manifest.tokens("val")) == ("bytes", 500)
    [train], [val] = (open_split(data, manifest, split) for split in ("train", "val"))
    assert bytes([*train[1:], *val]).decode() == TEXT  # the end of the text is held out
    records = storage.read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["tokens"] for r in records if r["kind"] == "validation"] == [499, 499]

    again = rekindle(*arguments, "--eval-tokens", 500, "--steps", 6)
    assert again.status == 0, again.err
    assert "is already prepared" in again.out
    assert "resumes at step 4 of 6" in again.out


def test_text_that_changed_since_the_start_is_an_error(
    tmp_path: Path, arguments: list[str], rekindle: Callable, one_thread: None
) -> None:
    assert rekindle(*arguments).status == 0
    (tmp_path / "my.txt").write_text(TEXT * 2)
    outcome = rekindle(*arguments)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1


def test_several_ranks_do_not_prepare(
    arguments: list[str], refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = arguments
    with pytest.raises(AssertionError, match="rank 0"):  # the error names the rank
        refuses(outcome)


def test_neither_data_nor_text(tmp_path: Path, refuses: Callable[..., str]) -> None:
    refuses(["train", "demo", "--out", tmp_path / "run"], "--data DIR is missing", "--text FILE")


def test_a_dry_run_prepares_nothing(arguments: list[str], refuses: Callable[..., str]) -> None:
    refuses([*arguments, "--dry-run"], "--dry-run writes nothing")
