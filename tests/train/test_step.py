"""The training step: against plain PyTorch, with every partition of a batch, and skipped steps."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rekindle import train
from rekindle.data.batches import Batches, Partition, Windows
from rekindle.data.shards import open_split, read_manifest
from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World, gradient_sync
from rekindle.train import StepResult, train_step

CPU = Device(torch.device("cpu"), "CPU", "fp32")
# The gradient of the key bias is only rounding error, which AdamW's usual 1e-8 would amplify.
EPS = 1e-6


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny: Recipe) -> GPT2:
    torch.manual_seed(0)
    return GPT2(tiny.model)


@pytest.fixture
def batches(shard_set: Path) -> Batches:
    shards = open_split(shard_set, read_manifest(shard_set), "train")
    return Batches(Windows(shards, 16), 8, 1, "shuffled")


@dataclass
class Training:
    """A model and optimizer, with the arguments that `train_step` needs."""

    model: GPT2
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        self.optimizer = AdamW(self.model, AdamWConfig(lr=1.0, eps=EPS))

    def step(
        self,
        xy: tuple[np.ndarray, np.ndarray],
        lr: float = 1e-2,
        forward: Any = None,
        clip: float = 0.5,
    ) -> StepResult:
        x, y = (torch.from_numpy(np.ascontiguousarray(a)) for a in xy)
        return train_step(
            forward or self.model, list(self.model.parameters()), self.optimizer, x, y,
            lr=lr, grad_clip=clip, limit=math.inf, device=CPU, world=self.world,
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        """A copy of the weights and the optimizer state."""
        inner = self.optimizer.state_tensors().values()
        return [t.detach().clone() for t in [*self.model.parameters(), *inner]]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_step_matches_plain_pytorch(model: GPT2, batches: Batches) -> None:
    plain = copy.deepcopy(model)
    matrices = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS, foreach=False)
    training = Training(model)
    norms = []
    for step in range(6):
        lr = 1e-2 / (step + 1)
        x, y = batches.batch(step, Partition.of(8, 2))
        seen = training.step((x, y), lr)

        optimizer.zero_grad()
        losses = []
        for micro_x, micro_y in zip(torch.from_numpy(x), torch.from_numpy(y.copy()), strict=True):
            _, loss = plain(micro_x, micro_y)
            losses.append(loss.item())
            (loss / len(x)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        norms.append(norm.item())
        assert not seen.skipped
        assert seen.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert seen.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert max(norms) > 0.5  # so the gradient was clipped at least once
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_synchronized_only_in_the_last_micro_batch(
    model: GPT2, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[bool] = []

    def sync(forward: Any, world: World, *, now: bool) -> Any:
        passes.append(now)
        return gradient_sync(forward, world, now=now)

    monkeypatch.setattr("rekindle.train.gradient_sync", sync)
    Training(model).step(batches.batch(0, Partition.of(8, 2)))
    assert passes == [False, False, False, True]


@dataclass(frozen=True)
class Alone(World):
    """One of several ranks, run in a single process: records its loss instead of averaging."""

    losses: list[float] = field(default_factory=list)

    def mean_(self, tensor: Tensor) -> None:
        self.losses.append(tensor.item())

    def max_(self, tensor: Tensor) -> None:
        pass


@pytest.mark.parametrize(
    ("micro_batch", "ranks"),
    [(8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 2), (2, 4), (1, 8)],
)
def test_every_partition_gives_the_same_gradient_and_loss(
    model: GPT2, batches: Batches, micro_batch: int, ranks: int
) -> None:
    x, y = batches.batch(3, Partition.of(8, 8))
    _, expected_loss = model(torch.from_numpy(x[0]), torch.from_numpy(y[0].copy()))
    expected = torch.autograd.grad(expected_loss, list(model.parameters()))

    losses, gradients = [], [torch.zeros_like(g) for g in expected]
    for rank in range(ranks):
        world = Alone(rank, ranks)
        training = Training(copy.deepcopy(model), world)
        training.step(batches.batch(3, Partition.of(8, micro_batch, rank, ranks)), clip=0.0)
        losses += world.losses
        for mean, p in zip(gradients, training.model.parameters(), strict=True):
            assert p.grad is not None
            mean += p.grad / ranks  # as DistributedDataParallel does
    assert len(losses) == ranks
    assert np.mean(losses) == pytest.approx(expected_loss.item(), rel=1e-6)
    for mean, like in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mean, like, rtol=1e-4, atol=1e-7)


def test_loss_is_copied_to_the_host_before_the_weights_are_updated(
    model: GPT2, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, the host then prepares the next step while the update runs."""
    training, calls = Training(model), []
    update = training.optimizer.step
    readback = train.Readback
    monkeypatch.setattr(train, "Readback", lambda t: calls.append("copy") or readback(t))
    monkeypatch.setattr(
        training.optimizer, "step", lambda skip: calls.append("step") or update(skip)
    )
    training.step(batches.batch(0, Partition.of(8, 8)))
    assert calls == ["copy", "step"]


Spoil = Callable[[GPT2, int, Tensor], Tensor]


def nan_loss(model: GPT2, call: int, loss: Tensor) -> Tensor:
    return loss * float("nan") if call == 2 else loss


def infinite_loss(model: GPT2, call: int, loss: Tensor) -> Tensor:
    return loss + float("inf") if call == 3 else loss


def infinite_gradient(model: GPT2, call: int, loss: Tensor) -> Tensor:
    """The square root has a finite value at 0, but an infinite slope."""
    bias = model.transformer.ln_f.bias
    return loss + (bias - bias.detach()).abs().sqrt().sum() if call == 1 else loss


@pytest.mark.parametrize("spoil", [nan_loss, infinite_loss, infinite_gradient])
def test_nonfinite_step_changes_nothing(model: GPT2, batches: Batches, spoil: Spoil) -> None:
    reference = Training(copy.deepcopy(model))
    training = Training(model)
    calls = []

    def forward(x: Tensor, y: Tensor) -> tuple[None, Tensor]:
        _, loss = model(x, y)
        calls.append(loss.item())
        return None, spoil(model, len(calls) - 1, loss)

    partition = Partition.of(8, 2)
    for step in (0, 1):
        training.step(batches.batch(step, partition))
        reference.step(batches.batch(step, partition))
    before = training.state()
    skipped = training.step(batches.batch(2, partition), forward=forward)
    assert len(calls) == 4
    assert skipped.skipped
    assert not (math.isfinite(skipped.loss) and math.isfinite(skipped.grad_norm))
    assert same_bits(training.state(), before)

    training.step(batches.batch(3, partition))  # continues as if that step had not been attempted
    reference.step(batches.batch(3, partition))
    assert same_bits(training.state(), reference.state())


def test_reported_loss_and_grad_norm_are_from_before_the_update(
    model: GPT2, batches: Batches
) -> None:
    training = Training(model)
    xy = batches.batch(0, Partition.of(8, 4))
    first = training.step(xy, lr=0.0)
    again = training.step(xy, lr=0.0)
    assert (first.loss, first.grad_norm) == (again.loss, again.grad_norm)
    assert first.grad_norm > 0.5  # from before clipping
