"""The modern model with Muon, through the command line: train, kill, resume, evaluate, sample."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import checkpoint, get_recipe, recipes, trainer
from rekindle.model.modern import Modern
from rekindle.optim.muon_config import MuonConfig, warmup_steps

TINY = [
    "--device",
    "cpu",
    "--no-compile",
    "--precision",
    "fp32",
    "--model.n-layer",
    "2",
    "--model.n-embd",
    "16",
    "--model.head-size",
    "8",
    "--model.block-size",
    "32",
    "--model.value-embeddings",
    "1",
    "--batch.tokens",
    "128",
    "--batch.length",
    "16",
    "--steps",
    "12",
    "--eval-every",
    "4",
    "--checkpoint-every",
    "4",
    "--keep-checkpoints",
    "0",
]

pytestmark = pytest.mark.usefixtures("one_thread")


class KilledError(Exception):
    pass


@pytest.fixture
def fast(rekindle: Callable[..., Any], shard_set: Path) -> Callable[..., Any]:
    return lambda out, *flags: rekindle(
        "train", "demo-fast", "--data", shard_set, "--out", out, *TINY, *flags
    )


def test_killed_and_resumed_run_has_the_same_bits(
    fast: Callable, rekindle: Callable, records: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert fast(tmp_path / "uninterrupted").status == 0
    original = trainer.learning_rate

    def kill(step: int, **options: Any) -> float:
        if step == 6:
            raise KilledError
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", kill)
        with pytest.raises(KilledError):
            fast(tmp_path / "killed")
    assert "resumes at step 4" in fast(tmp_path / "killed").out
    for name in checkpoint.FILES:
        files = [
            tmp_path / run / "checkpoints/step-000012" / name for run in ("uninterrupted", "killed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    kinds = ("train", "validation", "samples")
    assert records(tmp_path / "uninterrupted", *kinds) == records(tmp_path / "killed", *kinds)
    saved = checkpoint.load(tmp_path / "uninterrupted" / "checkpoints" / "step-000012")
    assert (saved.description.model_class, saved.description.optimizer_class) == ("modern", "muon")
    assert saved.model_class is Modern
    losses = [r["loss"] for r in records(tmp_path / "uninterrupted", "validation")]
    assert losses[-1] < losses[0] - 0.5

    flags = ["--device", "cpu", "--precision", "fp32", "--json"]
    evaluated = rekindle("eval", tmp_path / "uninterrupted", *flags)
    validation = json.loads(evaluated.out)["validation"]["loss"]
    assert validation == pytest.approx(losses[-1], rel=1e-5)
    flags = ["--device", "cpu", "--tokens", 8, "--num", 2, "--json"]
    sampled = rekindle("sample", tmp_path / "uninterrupted", *flags, "--prompt", "ab")
    assert len(json.loads(sampled.out)["samples"]) == 2, sampled.err


def test_other_model_cannot_resume_the_run(fast: Callable, rekindle: Callable, tmp_path: Path,
                                        shard_set: Path) -> None:  # fmt: skip
    assert fast(tmp_path / "run", "--steps", 4).status == 0
    where = ["--data", shard_set, "--out", tmp_path / "run", "--device", "cpu"]
    outcome = rekindle("train", "demo", *where)
    assert outcome.status == 2
    assert "was started with a different recipe" in outcome.err


def test_gpt2_rejects_flags_of_the_modern_model(rekindle: Callable, tmp_path: Path) -> None:
    arguments = ["train", "demo", "--data", tmp_path, "--out", tmp_path, "--model.head-size", 8]
    outcome = rekindle(*arguments)  # GPT-2 has no head size of its own
    assert outcome.status == 2
    assert "has no --model.head-size" in outcome.err


def test_with_steps_recomputes_hyperparameters() -> None:
    recipe = recipes.with_steps(get_recipe("demo-fast"), 150)
    assert recipe.optim == MuonConfig.by_rule(128, 150)
    assert recipe.schedule.warmup == warmup_steps(150) == 2
    assert recipes.with_steps(get_recipe("demo"), 7).optim == get_recipe("demo").optim


@pytest.mark.slow  # 278M parameters
def test_full_size_model_trains(
    rekindle: Callable, records: Callable, write_shards: Callable, tmp_path: Path
) -> None:
    write_shards(tmp_path / "data", [5000], [300])
    torch.set_num_threads(2)
    flags = ["--batch.tokens", 128, "--batch.length", 64, "--steps", 3, "--eval-tokens", 64]
    where = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu"]
    done = rekindle("train", "gpt2-124m-fast", *where, "--no-compile", *flags)
    assert done.status == 0, done.err
    losses = [r["loss"] for r in records(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]
