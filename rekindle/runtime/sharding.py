"""Weights that no rank holds whole: PyTorch's FSDP2, for models that do not fit into one GPU.

Each rank keeps a part of every weight, of its gradient and of its moments. A block's weights are
gathered before they act and let go of after, so that whatever calls a sharded model must be done by
all ranks together. FSDP is imported where it is used: that takes a second or two.
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
    """Move `model` to `device`, of each weight only this rank's part. Names stay as they are.

    Block by block, and then all else at once: the table that reads tokens is also the head.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    parts = [*model.blocks, cast(nn.Module, model)]
    for module in parts:
        # Without being told, the root would stay gathered after a forward pass without a backward.
        part = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows nothing else
    with torch.no_grad():  # what is called first is the root from then on
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    for module in parts:  # for the watchdog: from here on this rank needs the others
        module.register_forward_pre_hook(lambda *_: world.location.start_waiting(), prepend=True)


def is_sharded(model: object) -> bool:
    """Whether `shard` has been here."""
    return hasattr(model, "unshard")


@contextmanager
def parts_callable(model: object) -> Iterator[None]:
    """A model's body and head can be called by themselves in here, not only the model. On all
    ranks; what is not sharded is left alone."""
    if not is_sharded(model):
        yield
        return
    root = cast("FSDPModule", model)
    root.unshard()  # table and head; each block sees to itself
    try:
        yield
    finally:
        root.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, gathered on every rank if it is sharded: all ranks ask together."""
    return cast("DTensor", tensor).full_tensor() if _is_part(tensor) else tensor


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """A copy of `tensor`, which every rank has whole, on the device of `like`: this rank's part of
    it if `like` is sharded. No rank talks to another."""
    if not _is_part(like):
        return tensor.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    part = cast("DTensor", like)
    return distribute_tensor(tensor, part.device_mesh, part.placements, src_data_rank=None)


def _is_part(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")
