"""Validation loss: the same tokens and value for any batch size and number of ranks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rekindle.data.batches import IGNORED
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.errors import UserError
from rekindle.evaluate.loss import Loss, validation_loss
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

T = 16
BYTES = ByteTokenizer().token_bytes()
OnRanks = Callable[[int, Callable[[World], Loss]], list[Loss]]


@pytest.fixture(scope="module")
def shards() -> list[np.ndarray]:
    """Lengths that are and are not multiples of the window, and one too short for a target."""
    random = np.random.default_rng(0)
    lengths = (5 * T + 1, 3 * T + 8, 1, 2 * T, 2)
    return [random.integers(0, 257, n).astype(np.uint16) for n in lengths]


def reference(model: GPT2, shards: list[np.ndarray], limit: int) -> Loss:
    """The loss of each target by hand, one window at a time."""
    nats, count, size = 0.0, 0, 0
    for shard in shards:
        for start in range(0, len(shard) - 1, T):
            window = torch.from_numpy(shard[start : start + T + 1].astype(np.int64))
            window = window[: limit - count + 1]
            if len(window) < 2:
                continue
            with torch.no_grad():
                logits = model.lm_head(model.transformer(window[None, :-1]))[0].double()
            losses = -logits.log_softmax(-1).gather(-1, window[1:, None])
            nats += losses.sum().item()
            count += len(losses)
            size += int(BYTES[window[1:]].sum())
    return Loss(nats / count, nats / math.log(2) / size, count)


@pytest.mark.parametrize("limit", [10**6, 7 * T, 7 * T + 5, 5, 1])
@pytest.mark.parametrize(
    ("rows", "ranks"), [(1, 1), (4, 1), (64, 1), (1, 2), (3, 2), (2, 3), (8, 5)]
)
def test_loss_does_not_depend_on_batch_size_or_ranks(
    model: GPT2, shards: list[np.ndarray], cpu: Device, on_ranks: OnRanks, limit: int, rows: int,
    ranks: int,
) -> None:  # fmt: skip
    expected = reference(model, shards, limit)
    losses = on_ranks(
        ranks,
        lambda world: validation_loss(
            model, shards, BYTES, T=T, tokens=limit, rows=rows, device=cpu, world=world
        ),
    )
    assert len(set(losses)) == 1
    assert losses[0].tokens == expected.tokens == min(limit, sum(len(s) - 1 for s in shards))
    assert losses[0].nats == pytest.approx(expected.nats, rel=1e-6)
    assert losses[0].bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)


def test_each_target_is_scored_exactly_once_in_batches_of_one_shape(cpu: Device) -> None:
    """All tokens differ, so inputs and targets can be identified."""
    shards = [np.arange(0, 45, dtype=np.uint16), np.arange(100, 133, dtype=np.uint16)]
    seen: list[int] = []

    def forward(x: torch.Tensor, y: torch.Tensor) -> tuple[None, torch.Tensor]:
        assert x.shape == y.shape == (3, T)
        real = y != IGNORED
        assert (y[real] == x[real] + 1).all()
        seen.extend(y[real].tolist())
        return None, torch.tensor(1.0)

    loss = validation_loss(
        forward, shards, np.ones(257, np.int64), T=T, tokens=1000, rows=3, device=cpu
    )
    assert sorted(seen) == [*range(1, 45), *range(101, 133)]
    assert (loss.tokens, loss.nats) == (44 + 32, 1.0)
    assert loss.bits_per_byte == pytest.approx(1 / math.log(2))


def test_bits_per_byte_by_hand(cpu: Device) -> None:
    """3 targets of 2 nats each for 4 + 0 + 1 bytes of text: 6 / ln 2 / 5 bits per byte."""
    token_bytes = np.array([1, 4, 0])
    loss = validation_loss(
        lambda x, y: (None, torch.tensor(2.0)), [np.array([0, 1, 2, 0], np.uint16)], token_bytes,
        T=8, tokens=100, rows=2, device=cpu,
    )  # fmt: skip
    assert loss.tokens == 3
    assert loss.nats == 2.0
    assert loss.bits_per_byte == pytest.approx(6 / math.log(2) / 5)


def test_no_gradients_are_computed(model: GPT2, shards: list[np.ndarray], cpu: Device) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> tuple[None, torch.Tensor]:
        _, loss = model(x, y)
        assert not loss.requires_grad
        return None, loss

    validation_loss(forward, shards, BYTES, T=T, tokens=40, rows=2, device=cpu)


@pytest.mark.parametrize("shards", [[], [np.zeros(1, np.uint16)], [np.zeros(0, np.uint16)]])
def test_empty_split_is_a_user_error(model: GPT2, shards: list[np.ndarray], cpu: Device) -> None:
    with pytest.raises(UserError, match="validation split is empty"):
        validation_loss(model, shards, BYTES, T=T, tokens=100, rows=2, device=cpu)
