"""`rekindle train --dry-run`: everything is checked and printed, and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[Path], list[str]]


def test_a_dry_run_prints_what_a_run_would_do(
    tmp_path: Path, command: Command, rekindle: Callable, one_thread: None
) -> None:
    outcome = rekindle(*command(tmp_path / "run"), "--dry-run", "--micro-batch", 2)
    assert outcome.status == 0, outcome.err
    lines = {line.split("  ")[0]: line for line in outcome.out.splitlines()}
    assert "12 of 12, with 128 tokens each" in lines["steps"]
    assert "1,536: 1.26 epochs of 1,220 training tokens" in lines["tokens"]
    assert "8 rows of 16 tokens = 2 rows per pass × 4 accumulation steps × 1 rank" in lines["batch"]
    assert "every 4 steps and at the end, on 302 of 302 tokens" in lines["validation"]
    assert "all are kept" in lines["checkpoints"]
    assert "  --optim.lr 0.01" in outcome.out.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_run_that_has_begun(
    tmp_path: Path, command: Command, rekindle: Callable, train: Callable
) -> None:
    train(tmp_path / "run", "--steps", 4)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    outcome = rekindle(*command(tmp_path / "run"), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "8 of 12, with 128 tokens each" in outcome.out
    assert "note: --steps was 4 and is now 12" in outcome.out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_dry_run_finds_the_mistakes_of_a_run(
    tmp_path: Path, command: Command, refuses: Callable[..., str], one_thread: None
) -> None:
    flags: list[Any] = ["--dry-run", "--micro-batch", 3]
    refuses([*command(tmp_path / "run"), *flags], "8 rows does not divide into micro-batches of 3")
