"""A model and an optimizer from outside the package train, resume bit for bit, evaluate, sample and
log like built-in ones. Only their classes are passed in."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rekindle.trainer
from rekindle import MachineOptions, build, checkpoint, resolve
from rekindle.data.shards import open_split, read_manifest
from rekindle.errors import UserError
from rekindle.recipes import Recipe, flatten
from rekindle.run import RunOptions
from rekindle.sampling import generate
from rekindle.start import Parts, train_run
from tests.extension.five_choices import FiveChoices
from tests.extension.gated_model import GatedConfig, GatedModel
from tests.extension.memory_logger import MemoryLogger
from tests.extension.sign_optimizer import SignConfig, SignOptimizer

pytestmark = pytest.mark.usefixtures("one_thread")

MACHINE = MachineOptions(device="cpu", precision="fp32", compile=False, micro_batch=4)


@pytest.fixture
def recipe(tiny: Recipe) -> Recipe:
    return dataclasses.replace(tiny, name="toy", model=GatedConfig(), optim=SignConfig(memory=3))


@pytest.fixture
def run(recipe: Recipe, shard_set: Path, tmp_path: Path) -> Callable[[str], list[dict[str, Any]]]:
    """`run("name")`: train in a folder of that name; returns the records of the logger."""
    riddles = tmp_path / "riddles.txt"
    riddles.write_text("abc |def|gh|i|jk|l\nx|y|zz\n")

    def call(name: str) -> list[dict[str, Any]]:
        logger = MemoryLogger()
        parts = Parts(
            model=GatedModel,
            optimizer=SignOptimizer,
            tasks=[(FiveChoices(), str(riddles))],
            loggers=[logger],
        )
        train_run(recipe, shard_set, tmp_path / name, RunOptions(machine=MACHINE), parts)
        return [{k: v for k, v in r.items() if k in ("kind", "step", "loss")} for r in logger]

    return call


class KilledError(Exception):
    pass


def test_external_classes_train_and_resume_bit_for_bit(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run("straight")
    original = rekindle.trainer.learning_rate

    def killed(step: int, **options: Any) -> float:
        if step == 6:
            raise KilledError
        return original(step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rekindle.trainer, "learning_rate", killed)
        with pytest.raises(KilledError):
            run("stopped")
    resumed = run("stopped")
    assert [r for r in resumed if r["kind"] == "train"] == [
        r for r in straight if r["kind"] == "train" and r["step"] >= 4
    ]
    for name in checkpoint.FILES:
        files = [tmp_path / n / "checkpoints/step-000012" / name for n in ("straight", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()
    losses = [r["loss"] for r in straight if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    kinds = {r["kind"] for r in straight}
    assert kinds == {"train", "validation", "five_choices", "samples", "checkpoint"}


def test_checkpoint_names_the_external_classes(run: Callable, tmp_path: Path) -> None:
    run("run")
    path = tmp_path / "run" / "checkpoints" / "step-000012"
    with pytest.raises(
        UserError, match="holds a GatedModel, which is not one of Rekindle's models"
    ):
        checkpoint.load(path)
    saved = checkpoint.load(path, GatedModel)
    assert isinstance(saved.config, GatedConfig)
    description = saved.description
    assert (description.model_class, description.optimizer_class) == ("GatedModel", "SignOptimizer")
    assert description.recipe["optim.memory"] == 3
    assert description.recipe["model.width"] == 24


def test_trainer_without_a_run_folder(recipe: Recipe, shard_set: Path, tmp_path: Path) -> None:
    data = open_split(shard_set, read_manifest(shard_set), "train")

    def make() -> Any:
        return build(recipe, data, resolve(MACHINE), model=GatedModel, optimizer=SignOptimizer)

    with make() as trainer:
        first = [trainer.train_step().loss for _ in range(4)]
        path = trainer.save(tmp_path)
        rest = [trainer.train_step().loss for _ in range(4)]
        votes = trainer.optimizer.state_tensors()["votes"]
        assert votes.dtype == torch.int8
        assert votes.abs().max() == 3
        text = generate(trainer.model, [65], 8, num=2, seed=1, top_k=5)
        plain = generate(trainer.model, [65], 8, num=2, seed=1, top_k=5, use_cache=False)
        assert torch.equal(text, plain)
    assert len(set(first)) == 4
    with make() as trainer:
        trainer.restore(path)
        assert [trainer.train_step().loss for _ in range(4)] == rest


def test_state_of_another_optimizer_is_rejected(
    recipe: Recipe, shard_set: Path, tmp_path: Path
) -> None:
    data = open_split(shard_set, read_manifest(shard_set), "train")
    with build(recipe, data, resolve(MACHINE), model=GatedModel, optimizer=SignOptimizer) as it:
        path = it.save(tmp_path)

    class Other(SignOptimizer):
        pass

    with (
        build(recipe, data, resolve(MACHINE), model=GatedModel, optimizer=Other) as it,
        pytest.raises(UserError, match="was trained with SignOptimizer, not with Other"),
    ):
        it.restore(path)


def test_external_config_fields_are_flags(recipe: Recipe) -> None:
    from rekindle.flags import flags_of

    names = {flag.name for flag in flags_of(recipe)}
    assert {"model.width", "optim.memory"} <= names
    assert names < set(flatten(recipe))
