"""Accurate gradient norm and clipping, on one device or for sharded models."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# PyTorch's CPU kernel becomes inaccurate for large tensors: 0.3 % off for the 38.6M weights of
# GPT-2's embedding. The norm of the norms of blocks of this size is within 2e-6 at 355M parameters.
BLOCK = 65_536


def zero_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero all gradients in place, so that they remain views of DDP's buckets."""
    if gradients := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_zero_(gradients)  # pyright: ignore[reportPrivateImportUsage]


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together: a float32 scalar on their device.

    For a sharded model, this is the norm of the full gradient, the same on every rank; all ranks
    must call it together. Parameters without a gradient count as zero.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    blocks = [block for g in gradients for block in _local(g).flatten().split(BLOCK)]
    norm = nn.utils.get_total_norm(blocks)
    if not (gradients and _is_sharded(gradients[0])):
        return norm
    square = norm.square()
    dist.all_reduce(square, group=cast("DTensor", gradients[0]).device_mesh.get_group())
    return square.sqrt()


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, currently `norm`, is at most `limit`."""
    parameters = [p for p in parameters if p.grad is not None]
    if parameters and _is_sharded(parameters[0]):
        norm = _on_every_rank(norm, cast("DTensor", parameters[0]))
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # a DTensor, which takes a second to import


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors unchanged."""
    return cast("DTensor", tensor).to_local() if _is_sharded(tensor) else tensor


def _on_every_rank(scalar: Tensor, like: "DTensor") -> Tensor:
    """A scalar that is the same on all ranks, as a tensor that works with shards of `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(scalar, like.device_mesh, [Replicate()], run_check=False)
