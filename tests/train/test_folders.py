"""Folders and files that are not what a command expects."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import trainer as rekindle_trainer
from rekindle.errors import UserError
from rekindle.resume import _check_same_parent


def test_dangling_link_as_the_run_folder(
    tmp_path: Path, command: Callable[[Path], list[str]], refuses: Callable[..., str]
) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    refuses(command(tmp_path / "run"), "is a link to", "nowhere, which does not exist")


@pytest.mark.parametrize("content", ["garbage", "{}", '{"recipe": 1}'])
def test_damaged_run_json_can_be_removed(
    tmp_path: Path, train: Callable, command: Callable[[Path], list[str]], rekindle: Callable,
    content: str,
) -> None:  # fmt: skip
    train(tmp_path / "run", "--steps", 4)
    original = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(content)
    outcome = rekindle(*command(tmp_path / "run"), "--steps", 6)
    assert outcome.status == 2
    assert "run.json is damaged" in outcome.err
    assert "remove run.json, and the newest checkpoint replaces it\n" in outcome.err
    (tmp_path / "run" / "run.json").unlink()
    train(tmp_path / "run", "--steps", 6)
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {**again["recipe"], "steps": 4} == original["recipe"]
    assert again["data"] == original["data"]


def test_run_json_is_written_again_if_it_disappears(
    tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another disk is mounted over the folder of a run."""
    original = rekindle_trainer.learning_rate

    def hide(step: int, **options: Any) -> float:
        if step == 2:
            (tmp_path / "run" / "run.json").unlink()
        return original(step, **options)

    monkeypatch.setattr(rekindle_trainer, "learning_rate", hide)
    train(tmp_path / "run", "--steps", 4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["steps"] == 4


def test_run_folder_is_not_prepared_into(
    tmp_path: Path, train: Callable, refuses: Callable[..., str]
) -> None:
    train(tmp_path / "run", "--steps", 1)
    (tmp_path / "a.txt").write_text("some text")
    arguments = ["prepare", "--text", tmp_path / "a.txt", "--out", tmp_path / "run"]
    refuses(arguments, "is a run folder")


def test_failed_preparation_leaves_no_folder(tmp_path: Path, refuses: Callable[..., str]) -> None:
    """`refuses` compares everything under the folder before and after."""
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    for source, words in (
        (["--text", tmp_path / "a.txt"], "a.txt contains no documents"),
        (["--jsonl", tmp_path / "b.jsonl"], "b.jsonl"),
    ):
        refuses(["prepare", *source, "--tokenizer", "bytes", "--out", tmp_path / "new"], words)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "own").write_text("the user's")
    text = ["--text", str(tmp_path / "a.txt"), "--tokenizer", "bytes"]
    from rekindle.cli import main

    assert main(["prepare", *text, "--out", str(tmp_path / "new")]) == 2
    assert (tmp_path / "new" / "own").read_text() == "the user's"
    shutil.rmtree(tmp_path / "new")


def test_shard_on_a_single_rank_is_noted(tmp_path: Path, train: Callable) -> None:
    outcome = train(tmp_path / "run", "--steps", 1, "--shard")
    assert "note: --shard has no effect on a single rank" in outcome.out


@pytest.mark.parametrize(
    ("named", "same"),
    [
        ("old/parent", True),
        ("old/parent/checkpoints/step-000004", True),
        ("new/parent", True),  # moved
        ("new/parent/checkpoints/step-000004", True),
        ("new/parent/checkpoints/step-000008", False),
        ("new/other/checkpoints/step-000004", False),
        ("new/other", False),
    ],
)
def test_fork_accepts_only_its_own_parent(tmp_path: Path, named: str, same: bool) -> None:
    """The parent may have been moved; then its name and step must match."""
    parent = tmp_path / "old" / "parent" / "checkpoints" / "step-000004"
    if same:
        _check_same_parent(tmp_path / "fork", parent, tmp_path / named)
        return
    with pytest.raises(UserError, match="was forked from"):
        _check_same_parent(tmp_path / "fork", parent, tmp_path / named)
