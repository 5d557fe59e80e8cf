"""Several processes as one: what torchrun started, and the few sums they exchange."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process' place among all. Alone, every operation here does nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor over all ranks, in place. Gloo has no mean: whoever wants one divides."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def min(self, value: int, device: torch.device) -> int:
        """The smallest `value` any rank has."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def place() -> World:
    """Where torchrun put this process, from its environment; alone without torchrun."""
    return World(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def connect(world: World, device: torch.device) -> None:
    """Join the other processes: NCCL between GPUs, gloo between CPUs.

    The time-out is long enough for one rank to compile while the others wait for it.
    """
    if world.size > 1 and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(minutes=30),
            device_id=device if on_gpu else None,
        )
