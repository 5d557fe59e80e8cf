"""A checkpoint is restored bit for bit, or fails with an error that names the damaged file."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rekindle import checkpoint, storage
from rekindle.checkpoint import Snapshot, format
from rekindle.errors import UserError
from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe

FILES = ["checkpoint.json", "model.safetensors", "optimizer.safetensors"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(tiny: Recipe) -> tuple[GPT2, AdamW]:
    """A model that has taken three steps."""
    torch.manual_seed(0)
    model = GPT2(tiny.model)
    optimizer = AdamW(model, AdamWConfig(lr=1e-2))
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: AdamW) -> None:
    idx = torch.arange(32).view(2, 16)
    model.zero_grad()
    _, loss = model(idx, idx)
    loss.backward()
    optimizer.step(torch.tensor(False))


def state(model: GPT2, optimizer: AdamW) -> list[Tensor]:
    return [t.detach().clone() for t in (*model.parameters(), *optimizer.state_tensors().values())]


@pytest.fixture
def save(describe: Callable, tmp_path: Path) -> Callable[..., Path]:
    """`save(step, model, optimizer)`: write a checkpoint and return its path."""

    def write(step: int, model: GPT2, optimizer: AdamW) -> Path:
        snapshot = Snapshot(model, optimizer)
        snapshot.take(model, optimizer)
        return checkpoint.write(tmp_path, describe(step, model.config), snapshot)

    return write


@pytest.fixture
def saved(trained: tuple[GPT2, AdamW], save: Callable) -> Path:
    return save(3, *trained)


def test_weights_and_optimizer_state_are_restored_exactly(
    trained: tuple[GPT2, AdamW], saved: Path, tiny: Recipe
) -> None:
    model, optimizer = trained
    other = GPT2(tiny.model)
    other_optimizer = AdamW(other, AdamWConfig(lr=1e-2))
    loaded = checkpoint.load(saved)
    assert loaded.step == 3
    missing, unexpected = other.load_state_dict(loaded.model, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to wte, so saved once
    loaded.restore_optimizer(other_optimizer)
    for _ in range(2):
        before, after = state(model, optimizer), state(other, other_optimizer)
        assert len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        step(model, optimizer)
        step(other, other_optimizer)


def test_snapshot_is_independent_of_later_steps(trained: tuple[GPT2, AdamW]) -> None:
    """Also checks that the next snapshot reuses the memory."""
    model, optimizer = trained
    snapshot = Snapshot(model, optimizer)
    memory = [t.data_ptr() for t in (*snapshot.model.values(), *snapshot.optimizer.values())]
    for updates in (3, 4):
        snapshot.take(model, optimizer)
        names = dict(model.named_parameters())
        before = {name: p.detach().clone() for name, p in names.items()}
        state = {name: t.clone() for name, t in optimizer.state_tensors().items()}
        step(model, optimizer)
        assert (snapshot.optimizer["updates"] == updates).all()
        for taken, expected in ((snapshot.model, before), (snapshot.optimizer, state)):
            assert taken.keys() == expected.keys()
            assert all(torch.equal(taken[name], expected[name]) for name in expected)
        assert not any(torch.equal(snapshot.model[name], p) for name, p in names.items())
    now = [t.data_ptr() for t in (*snapshot.model.values(), *snapshot.optimizer.values())]
    assert now == memory


def test_snapshot_takes_twelve_bytes_per_parameter(
    trained: tuple[GPT2, AdamW],
) -> None:
    model, optimizer = trained
    snapshot = Snapshot(model, optimizer)
    tensors = [*snapshot.model.values(), *snapshot.optimizer.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    parameters = list(model.parameters())
    counts = 4 * len(parameters)
    assert sum(storages.values()) == 12 * sum(p.numel() for p in parameters) + counts


def test_untrained_model_can_be_saved(tiny: Recipe, save: Callable) -> None:
    model = GPT2(tiny.model)
    optimizer = AdamW(model, AdamWConfig(lr=1e-2))
    loaded = checkpoint.load(save(0, model, optimizer))
    other = AdamW(model, AdamWConfig(lr=1e-2))
    loaded.restore_optimizer(other)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, other)
    after = [p.detach().clone() for p in model.parameters()]
    for p, old in zip(model.parameters(), before, strict=True):
        p.data.copy_(old)
    step(model, optimizer)
    assert all(torch.equal(p, new) for p, new in zip(model.parameters(), after, strict=True))


def test_amend_changes_the_description(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    loaded = checkpoint.amend(loaded, evaluated=True, validation_loss=1.25)
    again = checkpoint.load(saved)
    assert again.description == loaded.description
    assert (again.description.evaluated, again.description.validation_loss) == (True, 1.25)


@pytest.mark.parametrize(("old_value", "expected"), [(False, "none"), (True, "all")])
def test_kernels_of_format_4_are_converted(saved: Path, old_value: bool, expected: str) -> None:
    file = saved / format.DESCRIPTION
    old = storage.read_json(file)
    del old["sha256"]
    old["format"], old["machine"]["kernels"] = 4, old_value
    storage.write_json(file, {**old, "sha256": format.description_sha256(old)})
    assert checkpoint.load(saved).description.machine.kernels == expected


def test_smallest_valid_values_are_accepted(saved: Path) -> None:
    """A sequence length of one, and one thread."""
    loaded = checkpoint.load(saved)
    recipe = {**loaded.description.recipe, "batch.length": 1}
    machine = dataclasses.replace(loaded.description.machine, threads=1)
    checkpoint.amend(loaded, recipe=recipe, machine=machine)
    assert checkpoint.load(saved).description.recipe["batch.length"] == 1


def test_tensors_have_gpt2_names(saved: Path, trained: tuple[GPT2, AdamW]) -> None:
    names = sorted(dict(trained[0].named_parameters()))
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert sorted(load_file(saved / "model.safetensors")) == names
    state = [f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names]
    assert sorted(load_file(saved / "optimizer.safetensors")) == [*state, "updates"]


def test_compiled_model_is_saved_under_plain_names(
    trained: tuple[GPT2, AdamW], save: Callable
) -> None:
    model, optimizer = trained
    torch.compile(model, backend="eager")(torch.zeros(1, 4, dtype=torch.long))
    saved = save(3, model, optimizer)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert not any("_orig_mod" in key for key in load_file(saved / name))


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        checkpoint.load(saved)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_named(saved: Path, name: str, part: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=re.escape(name)):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_detected(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    for position in range(0, len(content), max(1, len(content) // 50)):
        content[position] ^= 1
        (saved / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(name)):
            checkpoint.load(saved)
        content[position] ^= 1
    (saved / name).write_bytes(content)
    checkpoint.load(saved)


def test_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no"):
        checkpoint.find(tmp_path / "nothing")
    with pytest.raises(UserError, match="is not a run or a checkpoint"):
        checkpoint.find(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.find(tmp_path)
    storage.write_json(tmp_path / "checkpoint.json", ["something else"])
    with pytest.raises(UserError, match="is not a valid checkpoint description"):
        checkpoint.load(tmp_path)
    newer = {"format": 99}
    sha256 = format.description_sha256(newer)
    storage.write_json(tmp_path / "checkpoint.json", {**newer, "sha256": sha256})
    with pytest.raises(UserError, match="does not have checkpoint format 5"):
        checkpoint.load(tmp_path)


def make_folders(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_newest_checkpoint_is_found_by_number(tmp_path: Path) -> None:
    names = ["step-000009", "step-000010", "step-999999", "step-1000000"]
    make_folders(tmp_path / "checkpoints", *reversed(names), ".tmp-step-2000000", "step-x")
    (tmp_path / "checkpoints" / "step-3000000").write_text("a file")
    found = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in found] == names
    assert checkpoint.find(tmp_path) == found[-1]


@pytest.mark.parametrize(("keep", "left"), [(0, 4), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_prune_keeps_the_newest(tmp_path: Path, keep: int, left: int) -> None:
    names = [f"step-{n:06d}" for n in (5, 10, 15, 20)]
    make_folders(tmp_path, *names)
    checkpoint.prune(tmp_path, checkpoint.Keep(keep))
    assert sorted(p.name for p in tmp_path.iterdir()) == names[-left:]


def make_checkpoints(folder: Path, losses: dict[int, Any]) -> None:
    """Checkpoint folders that contain only a validation loss, by step."""
    for step, loss in losses.items():
        (folder / f"step-{step:06d}").mkdir()
        storage.write_json(
            folder / f"step-{step:06d}" / "checkpoint.json", {"validation_loss": loss}
        )


def kept(folder: Path, keep: checkpoint.Keep) -> list[int]:
    checkpoint.prune(folder, keep)
    assert all(p.name.startswith("step-") for p in folder.iterdir())
    return [int(p.name.removeprefix("step-")) for p in checkpoint.list_checkpoints(folder)]


LOSSES = {5: 3.0, 10: 1.0, 15: 2.0, 20: 4.0, 25: None, 30: 5.0}


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (checkpoint.Keep(newest=1, best=1), [10, 30]),
        (checkpoint.Keep(newest=2, best=2), [10, 15, 25, 30]),
        (checkpoint.Keep(newest=1, best=9), [5, 10, 15, 20, 30]),  # no loss was measured at 25
        (checkpoint.Keep(newest=1, every=10), [10, 20, 30]),
        (checkpoint.Keep(newest=2, best=1, every=15), [10, 15, 25, 30]),
        (checkpoint.Keep(newest=0, best=1, every=10), list(LOSSES)),
    ],
)
def test_prune_keeps_the_newest_the_best_and_every_nth(
    tmp_path: Path, keep: checkpoint.Keep, steps: list[int]
) -> None:
    make_checkpoints(tmp_path, LOSSES)
    assert kept(tmp_path, keep) == steps


def test_prune_counts_the_newest_among_the_best(tmp_path: Path) -> None:
    """If the newest checkpoint is the best, no older one is kept for `best`."""
    make_checkpoints(tmp_path, {5: 3.0, 10: 2.0, 15: 1.0})
    assert kept(tmp_path, checkpoint.Keep(newest=1, best=1)) == [15]


def test_prune_never_removes_the_newest(tmp_path: Path) -> None:
    """Whatever its loss. So a run that prunes after every checkpoint also keeps the best one."""
    best = []
    for step, loss in ((1, 5.0), (2, 1.0), (3, 9.0), (4, 8.0), (5, float("inf"))):
        make_checkpoints(tmp_path, {step: loss})
        best.append(kept(tmp_path, checkpoint.Keep(newest=1, best=1)))
    assert best == [[1], [2], [2, 3], [2, 4], [2, 5]]


@pytest.mark.parametrize(
    "description",
    [b"", b"{", b"[]", b"3", b"\xff", b'{"validation_loss": "1"}', b'{"validation_loss": NaN}',
     b'{"validation_loss": -Infinity}', b"[" * 99999, None],
)  # fmt: skip
def test_prune_ignores_damaged_descriptions(tmp_path: Path, description: bytes | None) -> None:
    make_checkpoints(tmp_path, {5: 1.0, 10: 2.0, 15: 3.0})
    file = tmp_path / "step-000005" / "checkpoint.json"
    file.write_bytes(description) if description is not None else file.unlink()
    assert kept(tmp_path, checkpoint.Keep(newest=1, best=1)) == [10, 15]
