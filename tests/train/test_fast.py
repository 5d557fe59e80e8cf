"""The modern model and Muon through the public commands: trained, killed, resumed, evaluated,
sampled."""

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


def test_killed_and_resumed_it_has_the_same_bits(
    fast: Callable, rekindle: Callable, records: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert fast(tmp_path / "straight").status == 0
    original = trainer.learning_rate

    def killed(step: int, **options: Any) -> float:
        if step == 6:
            raise KilledError
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", killed)
        with pytest.raises(KilledError):
            fast(tmp_path / "killed")
    assert "resumes at step 4" in fast(tmp_path / "killed").out
    for name in checkpoint.FILES:
        files = [
            tmp_path / run / "checkpoints/step-000012" / name for run in ("straight", "killed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    kinds = ("train", "validation", "samples")
    assert records(tmp_path / "straight", *kinds) == records(tmp_path / "killed", *kinds)
    saved = checkpoint.load(tmp_path / "straight" / "checkpoints" / "step-000012")
    assert (saved.description.model_class, saved.description.optimizer_class) == ("modern", "muon")
    assert saved.model_class is Modern
    losses = [r["loss"] for r in records(tmp_path / "straight", "validation")]
    assert losses[-1] < losses[0] - 0.5

    evaluated = rekindle("eval", tmp_path / "straight", "--device", "cpu", "--precision", "fp32",
                         "--json")  # fmt: skip
    validation = json.loads(evaluated.out)["validation"]["loss"]
    assert validation == pytest.approx(losses[-1], rel=1e-5)
    flags = ["--device", "cpu", "--tokens", 8, "--num", 2, "--json"]
    sampled = rekindle("sample", tmp_path / "straight", *flags, "--prompt", "ab")
    assert len(json.loads(sampled.out)["samples"]) == 2, sampled.err


def test_another_model_cannot_resume_it(fast: Callable, rekindle: Callable, tmp_path: Path,
                                        shard_set: Path) -> None:  # fmt: skip
    assert fast(tmp_path / "run", "--steps", 4).status == 0
    where = ["--data", shard_set, "--out", tmp_path / "run", "--device", "cpu"]
    refused = rekindle("train", "demo", *where)
    assert refused.status == 2
    assert "was begun with another recipe" in refused.err


def test_its_flags_are_its_own(rekindle: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):  # GPT-2 has no such number
        rekindle("train", "demo", "--data", tmp_path, "--out", tmp_path, "--model.head-size", 8)


def test_another_length_has_the_numbers_of_its_rules() -> None:
    recipe = recipes.with_steps(get_recipe("demo-fast"), 150)
    assert recipe.optim == MuonConfig.by_rule(128, 150)
    assert recipe.schedule.warmup == warmup_steps(150) == 2
    assert recipes.with_steps(get_recipe("demo"), 7).optim == get_recipe("demo").optim


def begun_with(run: Path) -> dict[str, Any]:
    names = ("steps", "optim.lr", "optim.momentum_warmup", "optim.weight_decay", "schedule.warmup")
    return {name: storage.read_json(run / "run.json")["recipe"][name] for name in names}


def test_steps_on_the_command_line_bring_the_numbers_of_their_rules(
    fast: Callable, tmp_path: Path
) -> None:
    """Unless these are given; a run that has begun keeps its own, and can be made longer."""
    assert fast(tmp_path / "a", "--steps", 4).status == 0
    rules = MuonConfig.by_rule(16, 4)
    expected = {"steps": 4, "optim.lr": rules.lr, "optim.momentum_warmup": rules.momentum_warmup,
                "optim.weight_decay": rules.weight_decay, "schedule.warmup": 0}  # fmt: skip
    assert begun_with(tmp_path / "a") == expected
    given = ("--optim.weight-decay", 0.25, "--schedule.warmup", 2)
    assert fast(tmp_path / "b", "--steps", 4, *given).status == 0
    changed = {"optim.weight_decay": 0.25, "schedule.warmup": 2}
    assert begun_with(tmp_path / "b") == expected | changed
    longer = fast(tmp_path / "a", "--steps", 8)
    assert longer.status == 0, longer.err
    assert "resumes at step 4 of 8" in longer.out
    assert fast(tmp_path / "a", "--steps", 8, "--optim.lr", 0.01).status == 2


def test_a_damaged_description_of_the_run_is_one_line(fast: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"recipe": {"optim.lr": "fast"}}')
    refused = fast(tmp_path / "run")
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "optim.lr is 'fast'" in refused.err


@pytest.mark.slow  # 278M parameters: a step is 1.6 · 10^12 operations of Newton and Schulz alone
@pytest.mark.timeout(3000)
def test_the_full_size_is_killed_and_resumed_with_the_same_bits(
    rekindle: Callable, records: Callable, write_shards: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gpt2 = get_tokenizer("gpt2")
    described = {"tokenizer": gpt2.name, "tokenizer_sha256": gpt2.sha256, "vocab_size": 50257}
    write_shards(tmp_path / "data", [5000], [300], **described)
    torch.set_num_threads(2)
    flags = ["--batch.tokens", 64, "--batch.length", 32, "--steps", 2, "--eval-tokens", 64]
    flags += ["--checkpoint-every", 1, "--eval-every", 1, "--keep-best", 0]
    flags += ["--keep-checkpoints", 1]

    def train(out: str) -> Any:
        where = ["--data", tmp_path / "data", "--out", tmp_path / out, "--device", "cpu"]
        return rekindle("train", "gpt2-124m-fast", *where, "--no-compile", *flags)

    straight = train("straight")
    assert straight.status == 0, straight.err
    assert "model: 277,921,992 parameters" in straight.out
    original = trainer.learning_rate

    def killed(step: int, **options: Any) -> float:
        if step == 1:
            raise KilledError
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learning_rate", killed)
        with pytest.raises(KilledError):
            train("killed")
    assert "resumes at step 1 of 2" in train("killed").out
    for name in checkpoint.FILES:
        files = [
            tmp_path / run / "checkpoints/step-000002" / name for run in ("straight", "killed")
        ]
        assert filecmp.cmp(*files, shallow=False)
    kinds = ("train", "validation", "samples")
    assert records(tmp_path / "straight", *kinds) == records(tmp_path / "killed", *kinds)
    losses = [r["loss"] for r in records(tmp_path / "straight", "validation")]
    assert losses[-1] < losses[0]
    run = [tmp_path / "straight", "--device", "cpu", "--json"]
    evaluated = rekindle("eval", *run)
    assert json.loads(evaluated.out)["validation"]["loss"] == pytest.approx(losses[-1], rel=1e-4)
    sampled = rekindle("sample", *run, "--tokens", 4, "--num", 1)
    assert len(json.loads(sampled.out)["samples"]) == 1, sampled.err
