"""Sharded models: PyTorch's FSDP2, for models that do not fit into one GPU.

Each rank holds a shard of every weight, its gradient and its optimizer state. A block's weights are
gathered before they are used and freed afterwards, so all ranks must call a sharded model together.
FSDP is imported where it is used because the import takes a second or two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rekindle.model import LanguageModel
from rekindle.runtime.distributed import World

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(model: LanguageModel, device: torch.device, world: World) -> None:
    """Move this rank's shard of every weight to `device`. Parameter names do not change.

    Each block is one FSDP unit, and everything else is another: embedding and head may share a
    weight.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    parts = [*model.blocks, cast(nn.Module, model)]
    for module in parts:
        # By default, the root would stay gathered after a forward pass without a backward pass.
        part = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    with torch.no_grad():  # FSDP takes the module that is called first as its root
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    for module in parts:  # tells the watchdog that this rank now needs the others
        module.register_forward_pre_hook(lambda *_: world.location.start_waiting(), prepend=True)


def is_sharded(model: object) -> bool:
    """Whether `shard` was applied to `model`."""
    return hasattr(model, "unshard")


@contextmanager
def unsharded_root(model: object) -> Iterator[None]:
    """Within this context, `body`, `head` and `losses` of a sharded model can be called directly.
    All ranks must enter it together. Does nothing for a model that is not sharded."""
    if not is_sharded(model):
        yield
        return
    root = cast("FSDPModule", model)
    root.unshard()  # embedding and head; each block gathers its own weights
    try:
        yield
    finally:
        root.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if `tensor` is sharded. All ranks must call this together."""
    return cast("DTensor", tensor).full_tensor() if _is_dtensor(tensor) else tensor


def shard_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A copy of the full `tensor` on the device of `like`, sharded if `like` is. Every rank has the
    full tensor, so there is no communication."""
    if not _is_dtensor(like):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    part = cast("DTensor", like)
    return distribute_tensor(tensor, part.device_mesh, part.placements, src_data_rank=None)


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
