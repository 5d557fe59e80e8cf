"""Validation loss over a fixed set of tokens, for any batch size and number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rekindle.data.batches import IGNORED, validation_batches
from rekindle.errors import UserError
from rekindle.model import HasParameters
from rekindle.model.compute import Forward
from rekindle.model.finite import why_not_finite
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

Progress = Callable[[int, float], None]  # units done by this rank, and the part (0 to 1) of all


def no_progress(count: int, part: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Loss:
    """A validation loss. `nats` is per token. `bits_per_byte` is comparable between tokenizers; it
    is nan if every target is an end-of-text token, because those stand for no bytes.

    The loss may not be finite. Training checks `nats` itself; call `check_finite` before reporting
    the loss to a user.
    """

    nats: float
    bits_per_byte: float
    tokens: int

    def check_finite(self, model: HasParameters) -> None:
        """Raise `UserError` with the reason if the loss of `model` is not finite."""
        if not math.isfinite(self.nats):
            raise UserError(f"the validation loss is {self.nats}: {why_not_finite(model)}")


@torch.no_grad()
def validation_loss(
    forward: Forward,
    shards: Sequence[np.ndarray],
    token_bytes: np.ndarray,
    *,
    T: int,
    tokens: int,
    rows: int,
    device: Device,
    world: World | None = None,
    progress: Progress = no_progress,
) -> Loss:
    """Mean cross-entropy of the first `tokens` targets of `shards` (all if there are fewer).

    `forward` is a model or its compiled form; all batches have the shape (`rows`, `T`).
    `token_bytes` (vocab_size,) is the number of bytes of text per token id. Sums are float64.
    `progress` is called after each batch, as often on every rank.
    Raises `UserError` if the shards contain no targets, or an id outside the vocabulary.
    """
    world = world or World()
    totals = torch.zeros(3, dtype=torch.float64)  # nats, targets, bytes
    mine = min(tokens, sum(max(0, len(shard) - 1) for shard in shards)) / world.size
    done = 0
    for x, y in validation_batches(
        shards, T, tokens, rows, world.rank, world.size, len(token_bytes)
    ):
        real = y[y != IGNORED]
        with device.autocast():
            _, mean = forward(
                torch.from_numpy(x).to(device.torch, non_blocking=True),
                torch.from_numpy(y).to(device.torch, non_blocking=True),
            )
        assert mean is not None
        if len(real):  # or this rank ran out of targets, but a sharded model needs all ranks
            nats = mean.item() * len(real)
            totals += torch.tensor([nats, len(real), token_bytes[real].sum()], dtype=torch.float64)
        done += len(real)
        progress(done, done / max(1, mine))
    totals = totals.to(device.torch) if device.torch.type == "cuda" else totals
    nats, count, size = world.totals(totals)
    if not count:
        raise UserError("the validation split is empty: prepare the data with --val-tokens")
    bits = nats / math.log(2) / size if size else math.nan
    return Loss(nats / count, bits, int(count))
