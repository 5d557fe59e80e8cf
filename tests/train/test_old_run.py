"""The current version resumes a run of version 0.1.0: the folder `old_run`, with checkpoints of
format 2, written after 3 steps on the shards of the fixture `shard_set`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OLD = Path(__file__).with_name("old_run")
FLAGS = {
    "--model.n-layer": 1, "--model.n-head": 2, "--model.n-embd": 4, "--model.block-size": 8,
    "--batch.length": 8, "--batch.tokens": 64, "--optim.lr": 0.01, "--schedule.warmup": 3,
    "--eval-every": 2, "--eval-tokens": 100, "--checkpoint-every": 0, "--keep-checkpoints": 1,
    "--steps": 6,
}  # fmt: skip
# The later steps as trained by version 0.1.0: loss and grad norm by step, and validation loss.
STEPS = {3: (5.9145856, 0.8165351), 4: (5.9169979, 0.7944376), 5: (5.8723965, 0.5449186)}
VALIDATION = {0: 5.9381388, 2: 5.9337598, 3: 5.9165187, 4: 5.8854824, 6: 5.8472801}


def test_old_run_resumes_with_the_same_losses(
    tmp_path: Path, rekindle: Callable[..., Any], shard_set: Path, one_thread: None,
    records: Callable[..., list[dict[str, Any]]],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(OLD, run)
    fixed = ["--data", shard_set, "--out", run, "--device", "cpu"]
    outcome = rekindle("train", "demo", *fixed, *(t for pair in FLAGS.items() for t in pair))
    assert outcome.status == 0, outcome.err
    seen = {r["step"]: r for r in records(run, "train")}
    assert list(seen) == [0, 1, 2, 3, 4, 5]
    for step, (loss, norm) in STEPS.items():
        assert seen[step]["loss"] == pytest.approx(loss, rel=1e-5)
        assert seen[step]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    validation = {r["step"]: r["loss"] for r in records(run, "validation")}
    assert validation == pytest.approx(VALIDATION, rel=1e-5)


def test_old_run_can_be_sampled_and_evaluated(
    tmp_path: Path, rekindle: Callable[..., Any], shard_set: Path
) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    for arguments in (
        ["sample", tmp_path / "run", "--tokens", 2, "--prompt", "a"],
        ["eval", tmp_path / "run", "--data", shard_set],
    ):
        outcome = rekindle(*arguments, "--device", "cpu")
        assert outcome.status == 0, outcome.err
    assert "validation loss 5.9165 nats/token" in outcome.out
