"""Checks that weights and optimizer state are finite, and bitwise equal on every rank.

A step that is too large can make them infinite or NaN, and faulty memory can make them differ
between ranks. Both would otherwise go unnoticed.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from rekindle.errors import UserError
from rekindle.model import HasParameters
from rekindle.optim import Optimizer
from rekindle.runtime.distributed import World
from rekindle.runtime.sharding import is_sharded

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def compare(model: HasParameters, optimizer: Optimizer, world: World, step: int) -> None:
    """Raise `UserError` on every rank, naming the rank and the tensor, if the ranks differ.

    Does nothing if the model is sharded: each rank then holds different data. `step`: number of
    steps taken.
    """
    if world.size == 1 or is_sharded(model):
        return
    named = dict(_tensors(model, optimizer))
    sums = torch.stack([checksum(tensor) for tensor in named.values()])
    by_rank = [tuple(row.tolist()) for row in world.gather(sums)]
    right, count = Counter(by_rank).most_common(1)[0]
    wrong = [rank for rank, found in enumerate(by_rank) if found != right]
    if not wrong:
        return
    name = next(n for n, a, b in zip(named, right, by_rank[wrong[0]], strict=True) if a != b)
    if 2 * count <= len(by_rank):  # no majority, so any rank may be wrong
        wrong = list(range(world.size))
    difference = (
        f"{name} on rank {wrong[0]} differs from the other ranks"
        if len(wrong) == 1
        else f"{name} differs between ranks {', '.join(map(str, wrong))}"
    )
    raise UserError(
        f"{difference} after step {step - 1}: faulty memory or a faulty GPU; replace it, then run "
        "the same command to resume from the newest checkpoint"
    )


def check_finite(model: HasParameters, optimizer: Optimizer, world: World, step: int) -> None:
    """Raise `UserError` on every rank, naming the tensor, if a weight or optimizer state on any
    rank is not finite. `step`: number of steps taken."""
    named = {name: getattr(t, "_local_tensor", t) for name, t in _tensors(model, optimizer)}
    finite = torch.stack([tensor.isfinite().all() for tensor in named.values()])
    wrong = [name for name, good in zip(named, finite.tolist(), strict=True) if not good]
    if world.min(0 if wrong else 1, finite.device):
        return
    raise UserError(
        f"{wrong[0] if wrong else 'a tensor on another rank'} is not finite after step {step - 1}, "
        "so no checkpoint was saved: lower --optim.lr and start from scratch, or --fork an older "
        "checkpoint"
    )


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's elements with their bits read as integers: a scalar int64. It does not
    depend on the order of summation, and any flipped bit changes it."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _tensors(model: HasParameters, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from optimizer.state_tensors().items()
