"""Training from Python on arrays, without a run folder."""

import dataclasses
import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rekindle import Machine, MachineOptions, Trainer, build, checkpoint, resolve
from rekindle.errors import UserError
from rekindle.recipes import Recipe
from tests.conftest import ROOT, make_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

EAGER = MachineOptions(device="cpu", precision="fp32", compile=False, micro_batch=4)


@pytest.fixture
def machine() -> Machine:
    return resolve(EAGER)


@pytest.fixture
def data() -> list[np.ndarray]:
    return [make_tokens(700, 1), make_tokens(520, 2)]


def state(trainer: Trainer) -> list[Tensor]:
    tensors = [*trainer.model.parameters(), *trainer.optimizer.state_tensors().values()]
    return [tensor.detach().clone() for tensor in tensors]


def take(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.train_step().loss for _ in range(steps)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_restored_trainer_continues_bit_for_bit(
    tiny: Recipe, data: list[np.ndarray], machine: Machine, tmp_path: Path
) -> None:
    with build(tiny, data, machine) as trainer:
        losses = take(trainer, 5)
        path = trainer.save(tmp_path / "saved")
        losses += take(trainer, 7)
        expected = state(trainer)
    assert path == tmp_path / "saved" / "step-000005"
    assert math.isfinite(losses[-1])
    with build(tiny, data, machine) as trainer:
        trainer.restore(path)
        assert (trainer.step, trainer.batch) == (5, 5)
        assert take(trainer, 7) == losses[5:]
        assert same(state(trainer), expected)


def test_trainer_matches_a_run_from_the_command_line(
    tiny: Recipe, machine: Machine, shard_set: Path, train: Callable, tmp_path: Path
) -> None:
    from rekindle.data.shards import open_split, read_manifest

    train(tmp_path / "run", "--micro-batch", 4)
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "step-000012")
    with build(tiny, open_split(shard_set, read_manifest(shard_set), "train"), machine) as trainer:
        take(trainer, 12)
        for name, p in trainer.model.named_parameters():
            assert torch.equal(p, saved.model[name]), name
        assert trainer.describe().machine == saved.description.machine
        assert trainer.describe().guard == saved.description.guard


def test_trainer_writes_no_files_on_its_own(
    tiny: Recipe, data: list[np.ndarray], machine: Machine, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with build(tiny, data, machine) as trainer:
        take(trainer, 2)
    assert list(tmp_path.iterdir()) == []


def test_random_state_of_the_caller_is_unchanged(
    tiny: Recipe, data: list[np.ndarray], machine: Machine
) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with build(tiny, data, machine) as trainer:
        take(trainer, 2)
    assert torch.equal(torch.rand(2), expected)


def test_restore_with_a_later_batch(
    tiny: Recipe, data: list[np.ndarray], machine: Machine, tmp_path: Path
) -> None:
    """Restoring with a later batch skips the batches in between, and checkpoints record that."""
    with build(tiny, data, machine) as trainer:
        take(trainer, 2)
        path = trainer.save(tmp_path)
        take(trainer, 3)
        trainer.restore(path, batch=trainer.batch)
        assert (trainer.step, trainer.batch) == (2, 5)
        losses = take(trainer, 2)
        later = trainer.save(tmp_path)
        losses += take(trainer, 2)
    numbers: list[int] = []
    with build(tiny, data, machine) as trainer:
        trainer.restore(later)
        original = trainer.batches.batch
        trainer.batches.batch = lambda n, p: numbers.append(n) or original(n, p)  # type: ignore
        assert take(trainer, 2) == losses[2:]
    assert numbers.count(7) == 2  # once for the warm-up, once by the prefetcher
    assert set(numbers) >= {7, 8}
    assert min(numbers) == 7


def test_no_step_beyond_the_recipe(tiny: Recipe, data: list[np.ndarray], machine: Machine) -> None:
    with build(dataclasses.replace(tiny, steps=2), data, machine) as trainer:
        take(trainer, 2)
        with pytest.raises(UserError, match="all 2 steps of the recipe are done"):
            trainer.train_step()


def test_build_completes_the_machine(tiny: Recipe, data: list[np.ndarray]) -> None:
    asked = resolve(dataclasses.replace(EAGER, micro_batch=None))
    assert asked.micro_batch is None
    with build(tiny, data, asked) as trainer:
        assert trainer.machine == dataclasses.replace(asked, micro_batch=8, recompute=False)
        assert trainer.partition.micro_batch == 8


def test_data_is_checked_before_and_after_each_read(
    tiny: Recipe, data: list[np.ndarray], machine: Machine
) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 7:
            raise UserError("the file was changed")

    with (
        build(tiny, data, machine, check=check) as trainer,
        pytest.raises(UserError, match="the file was changed"),
    ):
        take(trainer, 9)
    assert len(calls) >= 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 4, "batch.tokens": 129}, "not a whole number of windows"),
        ({"batch.tokens": 16 * 1000}, "one step needs 16,000 tokens"),
        ({"optim.lr": -1.0}, "--optim.lr must be at least 0"),
    ],
)
def test_invalid_recipe_is_an_error(
    tiny: Recipe, data: list[np.ndarray], machine: Machine, change: dict[str, Any], words: str
) -> None:
    from rekindle.recipes import override

    with pytest.raises(UserError, match=words):
        build(override(tiny, change), data, machine)


def test_checkpoint_of_another_model_is_an_error(
    tiny: Recipe, data: list[np.ndarray], machine: Machine, tmp_path: Path
) -> None:
    with build(tiny, data, machine) as trainer:
        path = trainer.save(tmp_path)
    deeper = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, n_layer=3))
    with (
        build(deeper, data, machine) as trainer,
        pytest.raises(UserError, match=r"holds a different model .n_layer is 2, not 3"),
    ):
        trainer.restore(path)


def test_nonfinite_weights_are_not_saved(
    tiny: Recipe, data: list[np.ndarray], machine: Machine, tmp_path: Path
) -> None:
    with build(tiny, data, machine) as trainer:
        with torch.no_grad():
            next(iter(trainer.model.parameters()))[0, 0] = math.nan
        with pytest.raises(UserError, match="is not finite"):
            trainer.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_example_in_the_docs_runs(tmp_path: Path) -> None:
    """Runs the code block from the page, unchanged, in a separate process."""
    page = (ROOT / "docs" / "python.md").read_text()
    [example] = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    done = subprocess.run(
        [os.sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True,  # type: ignore
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
