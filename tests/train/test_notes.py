"""Notes that `train` prints about questionable settings; forks whose parent was moved."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle import trainer
from rekindle.data.batches import Batches

pytestmark = pytest.mark.usefixtures("one_thread")


def notes(outcome: Any) -> list[str]:
    return [line for line in outcome.out.splitlines() if line.startswith("note: ")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", 3], "--schedule.warmup 3 is not shorter than --steps 3"),
        (["--steps", 4, "--schedule.warmup", 400], "--schedule.warmup 400 is not shorter"),
        (["--steps", 4, "--prompt", ""], "--prompt is empty: no samples"),
        (
            ["--steps", 4, "--prompt", "x" * 32],
            "--prompt has 32 tokens, but the context length is 32",
        ),
        (["--steps", 4, "--prompt", "é" * 40], "--prompt has 80 tokens"),
    ],
)
def test_questionable_settings_print_a_note(
    train: Callable, tmp_path: Path, flags: list[Any], words: str
) -> None:
    [note] = notes(train(tmp_path / "run", *flags))
    assert words in note


def test_good_settings_print_no_note(train: Callable, tmp_path: Path) -> None:
    assert notes(train(tmp_path / "run", "--steps", 4, "--prompt", "x" * 31)) == []
    assert notes(train(tmp_path / "run", "--steps", 4, "--prompt", "x" * 31)) == []


@pytest.mark.parametrize("steps", [5, 8, 40])
def test_changing_steps_prints_how_the_schedule_changes(
    train: Callable, tmp_path: Path, records: Callable, steps: int
) -> None:
    train(tmp_path / "run", "--steps", 4)
    [note] = notes(train(tmp_path / "run", "--steps", steps))
    assert f"--steps was 4 and is now {steps}" in note
    rates = [r["lr"] for r in records(tmp_path / "run", "train")]
    assert f"{rates[3]:.2e} at step 3, {rates[4]:.2e} at step 4" in note


@pytest.mark.parametrize("tokens", [0, -1])
def test_eval_tokens_must_be_positive(
    refuses: Callable, command: Callable, tmp_path: Path, tokens: int
) -> None:
    refuses([*command(tmp_path / "run"), "--eval-tokens", tokens], "--eval-tokens must be at least")


@pytest.mark.parametrize("flag", ["--prompt", "--passage"])
@pytest.mark.parametrize("text", [b"r\xe9sum\xe9", b"\xff", b"a\xc3"])
def test_text_must_be_utf8(
    refuses: Callable, command: Callable, tmp_path: Path, flag: str, text: bytes
) -> None:
    argument = os.fsdecode(text)
    refuses([*command(tmp_path / "run"), flag, argument], f"{flag} is not UTF-8")


@pytest.mark.parametrize("name", [b"r\xe9sultat", b"\xff", b"ok-\xc3"])
def test_run_folder_with_a_name_that_is_not_utf8(
    train: Callable, rekindle: Callable, tmp_path: Path, name: bytes
) -> None:
    out = tmp_path / os.fsdecode(name)
    train(out, "--steps", 4)
    assert "resumes at step 4" in train(out, "--steps", 5).out
    sampled = rekindle("sample", out, "--device", "cpu", "--num", 1, "--tokens", 2)
    assert sampled.status == 0, sampled.err


class KilledError(Exception):
    pass


def kill_before(patch: pytest.MonkeyPatch, step: int, train: Callable, *arguments: Any) -> None:
    original = trainer.learning_rate

    def rate(number: int, **options: Any) -> float:
        if number == step:
            raise KilledError
        return original(number, **options)

    with patch.context() as context:
        context.setattr(trainer, "learning_rate", rate)
        with pytest.raises(KilledError):
            train(*arguments)


@pytest.mark.parametrize("named", ["parent", "parent/checkpoints/step-000004"])
@pytest.mark.parametrize("own_checkpoint", [True, False])
def test_fork_resumes_after_it_and_its_parent_were_moved(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str,
    own_checkpoint: bool,
) -> None:  # fmt: skip
    old, new = tmp_path / "old", tmp_path / "new"
    train(old / "parent", "--steps", 4)
    fork = ("--steps", 12, "--fork", old / named)
    kill_before(monkeypatch, 10 if own_checkpoint else 6, train, old / "child", *fork)
    old.rename(new)
    resumed = train(new / "child", "--steps", 12, "--fork", new / named)
    assert f"resumes at step {8 if own_checkpoint else 4} of 12" in resumed.out
    if own_checkpoint:
        assert "has finished all 12 steps" in train(new / "child", "--steps", 12).out


def test_different_parent_with_the_same_name_is_an_error(
    train: Callable, rekindle: Callable, command: Callable, tmp_path: Path
) -> None:
    """While the actual parent still exists."""
    train(tmp_path / "a" / "parent", "--steps", 4)
    train(tmp_path / "b" / "parent", "--steps", 4, "--seed", 9)
    train(tmp_path / "child", "--steps", 8, "--fork", tmp_path / "a" / "parent")
    where = [*command(tmp_path / "child"), "--steps", 8, "--fork", tmp_path / "b" / "parent"]
    outcome = rekindle(*where)
    assert outcome.status == 2
    assert "was forked from" in outcome.err


def test_parent_checkpoint_removed_before_the_fork_saved(
    train: Callable, refuses: Callable, command: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    train(tmp_path / "parent", "--steps", 8)
    fork = ("--fork", tmp_path / "parent" / "checkpoints" / "step-000004")
    kill_before(monkeypatch, 6, train, tmp_path / "child", *fork)
    shutil.rmtree(fork[1])
    advice = "start the fork again in a new --out"
    refuses([*command(tmp_path / "child"), *fork], "is gone", advice)
    train(tmp_path / "again", "--fork", tmp_path / "parent")  # a new fork works


@pytest.mark.parametrize(
    ("length", "tokens", "next_batch"), [(16, 128, 4), (8, 128, 4), (32, 128, 4), (8, 64, 8)]
)
def test_fork_with_other_batch_size_continues_at_the_same_token(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, tokens: int,
    next_batch: int,
) -> None:  # fmt: skip
    """The parent has read 4 x 128 tokens."""
    train(tmp_path / "parent", "--steps", 4)
    numbers: list[int] = []
    original = Batches.batch

    def batch(batches: Batches, number: int, partition: Any) -> Any:
        numbers.append(number)
        return original(batches, number, partition)

    monkeypatch.setattr(Batches, "batch", batch)
    flags = ("--batch.length", length, "--batch.tokens", tokens, "--steps", 6)
    train(tmp_path / "child", "--fork", tmp_path / "parent", *flags)
    assert min(numbers) == next_batch
