"""What must hold of weights and optimizer state: finite numbers, and the same bits on every rank.

Faulty memory breaks the second and a step too large the first, both silently, so they are checked.
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

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def compare(model: HasParameters, optimizer: Optimizer, world: World, step: int) -> None:
    """Raise `UserError` on every rank if one of them differs; it names the rank and the tensor.
    If they are sharded, no two ranks have anything in common to compare."""
    if world.size == 1 or is_sharded(model):
        return
    named = dict(_tensors(model, optimizer))
    sums = torch.stack([checksum(tensor) for tensor in named.values()])
    everyones = [tuple(row.tolist()) for row in world.gather(sums)]
    right, many = Counter(everyones).most_common(1)[0]
    wrong = [rank for rank, theirs in enumerate(everyones) if theirs != right]
    if not wrong:
        return
    others = everyones[wrong[0]]
    name = next(n for n, a, b in zip(named, right, others, strict=True) if a != b)
    if 2 * many <= len(everyones):  # no majority: nobody can say who is right
        wrong = list(range(world.size))
    who = (
        f"rank {wrong[0]} has another {name} than the others"
        if len(wrong) == 1
        else f"the ranks {', '.join(map(str, wrong))} disagree about {name}"
    )
    raise UserError(
        f"{who} after step {step - 1}: memory or a GPU there is faulty; take it out, and the same "
        "command resumes from the newest checkpoint"
    )


def check_finite(model: HasParameters, optimizer: Optimizer, world: World, step: int) -> None:
    """Raise `UserError` on every rank if a weight or an optimizer state on any rank is not finite;
    it names the tensor. `step`: how many steps have been taken."""
    named = {name: getattr(t, "_local_tensor", t) for name, t in _tensors(model, optimizer)}
    finite = torch.stack([tensor.isfinite().all() for tensor in named.values()])
    wrong = [name for name, good in zip(named, finite.tolist(), strict=True) if not good]
    if world.min(0 if wrong else 1, finite.device):
        return
    raise UserError(
        f"{wrong[0] if wrong else 'a tensor on another rank'} is not finite after step {step - 1}, "
        "so no checkpoint was saved: lower --optim.lr, and start anew or from an older checkpoint "
        "with --fork"
    )


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers of its size: a scalar int64. In any order
    it is the same, and one flipped bit changes it."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _tensors(model: HasParameters, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from optimizer.state_tensors().items()
