"""A checkpoint comes back bit for bit, or is refused by name."""

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
    """`save(step, model, optimizer)`: a checkpoint."""

    def write(step: int, model: GPT2, optimizer: AdamW) -> Path:
        snapshot = Snapshot(model, optimizer)
        snapshot.take(model, optimizer)
        return checkpoint.write(tmp_path, describe(step, model.config), snapshot)

    return write


@pytest.fixture
def saved(trained: tuple[GPT2, AdamW], save: Callable) -> Path:
    return save(3, *trained)


def test_weights_and_optimizer_come_back(
    trained: tuple[GPT2, AdamW], saved: Path, tiny: Recipe
) -> None:
    model, optimizer = trained
    other = GPT2(tiny.model)
    other_optimizer = AdamW(other, AdamWConfig(lr=1e-2))
    loaded = checkpoint.load(saved)
    assert loaded.step == 3
    missing, unexpected = other.load_state_dict(loaded.model, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # the tied one, saved once
    loaded.restore_optimizer(other_optimizer)
    for _ in range(2):
        before, after = state(model, optimizer), state(other, other_optimizer)
        assert len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        step(model, optimizer)
        step(other, other_optimizer)


def test_a_snapshot_stays_as_it_was(trained: tuple[GPT2, AdamW]) -> None:
    """And the next one takes no more memory."""
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


def test_a_snapshot_takes_twelve_bytes_a_parameter(
    trained: tuple[GPT2, AdamW],
) -> None:
    model, optimizer = trained
    snapshot = Snapshot(model, optimizer)
    tensors = [*snapshot.model.values(), *snapshot.optimizer.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    parameters = list(model.parameters())
    counts = 4 * len(parameters)
    assert sum(storages.values()) == 12 * sum(p.numel() for p in parameters) + counts


def test_a_model_that_has_taken_no_step_can_be_saved(tiny: Recipe, save: Callable) -> None:
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


def test_a_description_can_be_amended(saved: Path) -> None:
    loaded = checkpoint.load(saved)
    loaded = checkpoint.amend(loaded, evaluated=True, validation_loss=1.25)
    again = checkpoint.load(saved)
    assert again.description == loaded.description
    assert (again.description.evaluated, again.description.validation_loss) == (True, 1.25)


def test_the_least_that_a_run_can_have_is_read(saved: Path) -> None:
    """Windows of one token, on one thread."""
    loaded = checkpoint.load(saved)
    recipe = {**loaded.description.recipe, "batch.length": 1}
    machine = dataclasses.replace(loaded.description.machine, threads=1)
    checkpoint.amend(loaded, recipe=recipe, machine=machine)
    assert checkpoint.load(saved).description.recipe["batch.length"] == 1


def test_names_are_gpt2s_own(saved: Path, trained: tuple[GPT2, AdamW]) -> None:
    names = sorted(dict(trained[0].named_parameters()))
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert sorted(load_file(saved / "model.safetensors")) == names
    moments = [f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in names]
    assert sorted(load_file(saved / "optimizer.safetensors")) == [*moments, "updates"]


def test_a_compiled_model_is_saved_under_clean_names(
    trained: tuple[GPT2, AdamW], save: Callable
) -> None:
    model, optimizer = trained
    torch.compile(model, backend="eager")(torch.zeros(1, 4, dtype=torch.long))
    saved = save(3, model, optimizer)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert not any("_orig_mod" in key for key in load_file(saved / name))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=re.escape(name)):
        checkpoint.load(saved)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_named(saved: Path, name: str, part: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=re.escape(name)):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    for position in range(0, len(content), max(1, len(content) // 50)):
        content[position] ^= 1
        (saved / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(name)):
            checkpoint.load(saved)
        content[position] ^= 1
    (saved / name).write_bytes(content)
    checkpoint.load(saved)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="does not have checkpoint format 4"):
        checkpoint.load(tmp_path)


def make_folders(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_the_newest_is_found_by_its_number(tmp_path: Path) -> None:
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
    """Folders of these steps that say so of their validation loss."""
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
        (checkpoint.Keep(newest=1, best=9), [5, 10, 15, 20, 30]),  # 25 was not measured
        (checkpoint.Keep(newest=1, every=10), [10, 20, 30]),
        (checkpoint.Keep(newest=2, best=1, every=15), [10, 15, 25, 30]),
        (checkpoint.Keep(newest=0, best=1, every=10), list(LOSSES)),
    ],
)
def test_prune_keeps_the_best_and_every_so_many_beside_the_newest(
    tmp_path: Path, keep: checkpoint.Keep, steps: list[int]
) -> None:
    make_checkpoints(tmp_path, LOSSES)
    assert kept(tmp_path, keep) == steps


def test_the_best_may_be_among_the_newest(tmp_path: Path) -> None:
    """And is then not sought among the older ones."""
    make_checkpoints(tmp_path, {5: 3.0, 10: 2.0, 15: 1.0})
    assert kept(tmp_path, checkpoint.Keep(newest=1, best=1)) == [15]


def test_the_newest_is_never_removed(tmp_path: Path) -> None:
    """Whatever its loss; and so a run that prunes after every checkpoint keeps the best one."""
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
def test_a_damaged_description_is_not_the_best(tmp_path: Path, description: bytes | None) -> None:
    make_checkpoints(tmp_path, {5: 1.0, 10: 2.0, 15: 3.0})
    file = tmp_path / "step-000005" / "checkpoint.json"
    file.write_bytes(description) if description is not None else file.unlink()
    assert kept(tmp_path, checkpoint.Keep(newest=1, best=1)) == [10, 15]
