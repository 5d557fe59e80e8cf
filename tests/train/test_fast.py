"""The modern model with Muon, through the command line: train, kill, resume, evaluate, sample."""

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle import checkpoint, get_recipe, recipes, storage, trainer
from rekindle.data.tokenizer import get_tokenizer
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


def started_with(run: Path) -> dict[str, Any]:
    names = ("steps", "optim.lr", "optim.momentum_warmup", "optim.weight_decay", "schedule.warmup")
    return {name: storage.read_json(run / "run.json")["recipe"][name] for name in names}


def test_steps_flag_recomputes_hyperparameters(fast: Callable, tmp_path: Path) -> None:
    """Except those that are given. A lengthened run keeps those that it was started with."""
    assert fast(tmp_path / "a", "--steps", 4).status == 0
    rules = MuonConfig.by_rule(16, 4)
    expected = {
        "steps": 4,
        "optim.lr": rules.lr,
        "optim.momentum_warmup": rules.momentum_warmup,
        "optim.weight_decay": rules.weight_decay,
        "schedule.warmup": warmup_steps(4),
    }
    assert started_with(tmp_path / "a") == expected
    given = ("--optim.weight-decay", 0.25, "--schedule.warmup", 2)
    assert fast(tmp_path / "b", "--steps", 4, *given).status == 0
    changed = {"optim.weight_decay": 0.25, "schedule.warmup": 2}
    assert started_with(tmp_path / "b") == expected | changed
    longer = fast(tmp_path / "a", "--steps", 8)
    assert longer.status == 0, longer.err
    assert "resumes at step 4 of 8" in longer.out
    assert fast(tmp_path / "a", "--steps", 8, "--optim.lr", 0.01).status == 2


def test_damaged_run_description_is_one_line(fast: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"recipe": {"optim.lr": "fast"}}')
    outcome = fast(tmp_path / "run")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "run.json" in outcome.err


@pytest.mark.slow  # 278M parameters
@pytest.mark.timeout(1200)
def test_full_size_run_resumes_with_the_same_bits(
    rekindle: Callable, records: Callable, write_shards: Callable, tmp_path: Path
) -> None:
    """Three steps in all: two, and the second again from the first checkpoint, as after a kill."""
    gpt2 = get_tokenizer("gpt2")
    described = {"tokenizer": gpt2.name, "tokenizer_sha256": gpt2.sha256, "vocab_size": 50257}
    write_shards(tmp_path / "data", [5000], [300], **described)
    torch.set_num_threads(2)
    out = tmp_path / "run"
    flags = ["--batch.tokens", 64, "--batch.length", 32, "--steps", 2, "--eval-tokens", 64]
    flags += ["--checkpoint-every", 1, "--keep-checkpoints", 0, "--keep-best", 0]
    flags += ["--eval-every", 2, "--no-compile"]

    def train() -> Any:
        where = ["--data", tmp_path / "data", "--out", out, "--device", "cpu"]
        return rekindle("train", "gpt2-124m-fast", *where, *flags)

    uninterrupted = train()
    assert uninterrupted.status == 0, uninterrupted.err
    assert "model: 277,921,992 parameters" in uninterrupted.out
    kinds = ("train", "validation", "samples")
    logged = records(out, *kinds)
    losses = [r["loss"] for r in logged if r["kind"] == "validation"]
    assert losses[-1] < losses[0]
    last = out / "checkpoints" / "step-000002"
    last.rename(tmp_path / "expected")
    assert "resumes at step 1 of 2" in train().out
    for name in checkpoint.FILES:
        assert filecmp.cmp(tmp_path / "expected" / name, last / name, shallow=False)
    assert records(out, *kinds) == logged
    run = [out, "--device", "cpu", "--json"]
    evaluated = rekindle("eval", *run)
    assert json.loads(evaluated.out)["validation"]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    sampled = rekindle("sample", *run, "--tokens", 4, "--num", 1)
    assert len(json.loads(sampled.out)["samples"]) == 1, sampled.err
