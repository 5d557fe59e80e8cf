"""Several processes as one: what torchrun started, and the few sums they exchange."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from rekindle.errors import UserError


class Place:
    """Where a rank stands in the program, for the watchdog to tell."""

    def __init__(self) -> None:
        self._text, self._waiting_since = "the start", 0.0

    def at(self, text: str) -> None:
        """This rank has come to `text` and waits for nobody."""
        self._text, self._waiting_since = text, 0.0

    def waits(self) -> None:
        """It has given its part and needs the others'. On a GPU it goes on in the meantime, and
        only the next `at` shows that they came."""
        self._waiting_since = time.monotonic()

    def goes_on(self) -> None:
        self._waiting_since = 0.0

    def waited(self) -> float:
        """Seconds since `waits`; 0 if it does not wait."""
        return time.monotonic() - self._waiting_since if self._waiting_since else 0.0

    def now(self) -> str:
        return f"waiting in {self._text}" if self._waiting_since else self._text


@dataclass(frozen=True)
class World:
    """This process' place among all. Alone, every operation here does nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    place: Place = field(default_factory=Place, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor over all ranks, in place. Gloo has no mean: whoever wants one divides."""
        if self.size > 1:
            with self._together(done=dist.get_backend() == "gloo"):
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def min(self, value: int, device: torch.device) -> int:
        """The smallest `value` any rank has."""
        return -self.max(-value, device)

    def max(self, value: int, device: torch.device) -> int:
        """The largest `value` any rank has."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        with self._together():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return int(tensor)

    def agree(self, value: int, meaning: str, device: torch.device) -> None:
        """Raise `UserError` on every rank unless all have the same `value`."""
        least, most = self.min(value, device), self.max(value, device)
        if least != most:
            raise UserError(
                f"the ranks see different files: to this one {meaning} {value}, to others it is "
                f"{least if value == most else most}; give a folder that all hosts share"
            )

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in order; all have one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._together():
            dist.all_gather(found, tensor)
            return [each.cpu() for each in found]

    def barrier(self) -> None:
        if self.size > 1:
            with self._together():
                dist.barrier()

    @contextmanager
    def _together(self, *, done: bool = True) -> Iterator[None]:
        """Something that needs every rank. `done`: it is over when the body is; NCCL's sums are
        only begun there."""
        self.place.waits()
        try:
            yield
        except RuntimeError as error:
            raise UserError(
                f"lost touch with another rank ({reason(error)}): what ended it says so itself; "
                "the same command goes on from the newest checkpoint"
            ) from error
        if done:
            self.place.goes_on()

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


def connect(world: World, device: torch.device) -> str:
    """Join the other processes: NCCL between GPUs, gloo between CPUs. Returns the name of this life
    of theirs, see `meet`.

    The time-out is long enough for one rank to compile while the others wait for it.
    """
    if world.size == 1 or dist.is_initialized():
        return ""
    on_gpu, timeout = device.type == "cuda", timedelta(minutes=30)
    try:
        store, *_ = next(rendezvous("env://", timeout=timeout))
        life = meet(store, world.rank, world.size)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=PrefixStore(life, store), timeout=timeout,
            rank=world.rank, world_size=world.size, device_id=device if on_gpu else None,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(
            f"the ranks did not meet ({reason(error)}): what kept another one away it says itself; "
            "give the same command again"
        ) from error
    return life


def meet(store: Store, rank: int, size: int) -> str:
    """Wait for all ranks. Returns a name that they share and that no ranks before them had.

    torchrun keeps its store when it begins anew, and with it the addresses of those that died, to
    which gloo would connect. Its count of restarts is no such name: each host has its own.
    """
    store.set(f"rekindle/{rank}", os.urandom(8).hex())
    while True:
        everyone = [store.get(f"rekindle/{r}").decode() for r in range(size)]
        life = "rekindle/" + "-".join(everyone)  # some of it may be of a rank that died
        store.set(f"{life}/{rank}", "met")
        if store.check([f"{life}/{r}" for r in range(size)]):  # they read the same, so it is new
            return life
        time.sleep(0.05)


def reason(error: RuntimeError) -> str:
    """What torch says, without the line of its source and its advice."""
    line = str(error).splitlines()[0]
    return re.sub(r"\[/\S*\] ", "", line).partition(". ")[0]
