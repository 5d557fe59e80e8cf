"""Data-parallel training over several processes: rendezvous and collectives."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from rekindle.errors import UserError

_LAUNCHER = (
    "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT belong together: start the ranks "
    "with torchrun, set all of them, or unset all of them"
)
TIMEOUT = 600.0  # default number of seconds that a rank waits for the others


class Location:
    """Where in the program this rank is, for the watchdog to report."""

    def __init__(self) -> None:
        self._text, self._waiting_since = "the start", 0.0

    def at(self, text: str) -> None:
        """This rank has reached `text` and is not waiting for other ranks."""
        self._text, self._waiting_since = text, 0.0

    def start_waiting(self) -> None:
        """This rank has entered a collective and needs the others. On a GPU a collective returns
        before it is done; only the next `at` shows that the others took part."""
        self._waiting_since = time.monotonic()

    def stop_waiting(self) -> None:
        self._waiting_since = 0.0

    def waited(self) -> float:
        """Seconds since `start_waiting`; 0 if this rank is not waiting."""
        return time.monotonic() - self._waiting_since if self._waiting_since else 0.0

    def now(self) -> str:
        return f"waiting in {self._text}" if self._waiting_since else self._text


@dataclass(frozen=True)
class World:
    """This process's rank, and collectives over all ranks; no-ops with a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    location: Location = field(default_factory=Location, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files on behalf of all ranks."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Sum each tensor over all ranks, in place."""
        if self.size > 1:
            with self.collective(done=dist.get_backend() == "gloo"):
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def mean_(self, tensor: Tensor) -> None:
        """Average `tensor` over all ranks, in place."""
        self.sum_(tensor)
        tensor /= self.size

    def max_(self, tensor: Tensor) -> None:
        """Reduce `tensor` to its maximum over all ranks, in place. Does not wait for a GPU."""
        if self.size > 1:
            with self.collective(done=dist.get_backend() == "gloo"):
                dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def min(self, value: int, device: torch.device) -> int:
        """The smallest `value` of all ranks."""
        return -self.max(-value, device)

    def max(self, value: int, device: torch.device) -> int:
        """The largest `value` of all ranks."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        with self.collective():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return int(tensor)

    def agree(self, value: int, meaning: str, advice: str, device: torch.device) -> None:
        """Raise `UserError` on every rank unless all of them have the same `value`."""
        least, most = self.min(value, device), self.max(value, device)
        if least != most:
            raise UserError(
                f"the ranks disagree: on this rank {meaning} {value}, on another "
                f"{least if value == most else most}; {advice}"
            )

    def totals(self, values: Tensor) -> list[float]:
        """`values` summed over all ranks. Waits until the sums have arrived."""
        self.sum_(values)
        totals = values.tolist()
        self.location.stop_waiting()
        return totals

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The `tensor` of every rank on the CPU, in rank order. All must have the same shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.collective():
            dist.all_gather(found, tensor)
            return [each.cpu() for each in found]

    def barrier(self) -> None:
        if self.size > 1:
            with self.collective():
                dist.barrier()

    @contextmanager
    def collective(self, *, done: bool = True) -> Iterator[None]:
        """A context for an operation that needs every rank. `done`: the operation is complete when
        the body ends; an NCCL sum is only enqueued by then."""
        self.location.start_waiting()
        with explaining_lost_ranks():
            yield
        if done:
            self.location.stop_waiting()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def data_parallel(module: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Wrap `module` (compiled or not) in `DistributedDataParallel`, which averages gradients over
    the ranks. With a single process, return `module` itself."""
    if world.size == 1:
        return module
    with world.collective():
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )


@contextmanager
def gradient_sync(forward: object, world: World, *, now: bool) -> Iterator[None]:
    """A context for a forward and backward pass. DDP averages the gradients only if it is `now`."""
    if not isinstance(forward, DistributedDataParallel):
        yield
    elif now:
        with world.collective(done=dist.get_backend() == "gloo"):
            yield
    else:
        with forward.no_sync():
            yield


def get_world() -> World:
    """The rank of this process, from the environment variables of torchrun or another launcher; a
    single process without them.

    Raises `UserError` if only some of them are set. MASTER_ADDR and MASTER_PORT alone are accepted:
    some clusters always set them.
    """
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not any(number is not None for number in numbers.values()):
        return World()
    rank, local_rank, size = (_launcher_number(name, text) for name, text in numbers.items())
    if not 0 <= rank < size or not 0 <= local_rank < size:
        raise UserError(
            f"RANK {rank} and LOCAL_RANK {local_rank} must be below WORLD_SIZE {size}: check how "
            "the ranks were started"
        )
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            _launcher_value(name, os.environ.get(name))
        _launcher_number("MASTER_PORT", os.environ.get("MASTER_PORT"))
    return World(rank=rank, size=size, local_rank=local_rank)


def _launcher_number(name: str, text: str | None) -> int:
    text = _launcher_value(name, text)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name} is {text!r}, which is not a whole number: {_LAUNCHER}")
    return int(text)


def _launcher_value(name: str, text: str | None) -> str:
    if not text:
        raise UserError(f"{name} is {'missing' if text is None else 'empty'}: {_LAUNCHER}")
    return text


@contextmanager
def explaining_lost_ranks() -> Iterator[None]:
    """A context that turns the loss of another rank into a `UserError`; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"lost the connection to another rank ({reason(error)}): see that rank's error; the "
            "same command resumes from the newest checkpoint"
        ) from error


def connect(world: World, device: torch.device, limit: float = TIMEOUT) -> str:
    """Join the process group: NCCL for GPUs, gloo for CPUs. Returns the generation of ranks, a name
    that changes with every restart (see `rendezvous`).

    `limit`: seconds to wait for the other ranks; 0: no limit. torch's own timeout is longer, so
    that it never ends a run in which some ranks wait while another compiles.
    """
    if world.size == 1 or dist.is_initialized():
        return ""
    on_gpu = device.type == "cuda"
    timeout = timedelta(seconds=max(1800, 2 * limit)) if limit else timedelta(days=365)
    try:
        store = _open_store(world, timedelta(seconds=limit) if limit else timeout)
        store.set_timeout(timeout)
        generation = rendezvous(store, world.rank, world.size, limit)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=PrefixStore(generation, store), timeout=timeout,
            rank=world.rank, world_size=world.size, device_id=device if on_gpu else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # ValueError if torchrun's variables are missing
        raise UserError(
            f"the ranks could not connect to each other ({reason(error)}): see the other ranks' "
            "errors, then run the same command again"
        ) from error
    return generation


def _open_store(world: World, timeout: timedelta) -> Store:
    """The store for the rendezvous: torchrun's, or else one that rank 0 opens. Does not wait for
    the other ranks: `rendezvous` does, and names the missing ones."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(host, port, is_master=opens, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        where = f"MASTER_ADDR {host}, MASTER_PORT {port}"
        if opens:
            raise UserError(
                f"rank 0 cannot listen at {where} ({reason(error)}): if the port is in use, give "
                "all ranks another MASTER_PORT"
            ) from error
        raise UserError(
            f"could not reach rank 0 at {where} within {timeout.total_seconds():.0f} s "
            f"({reason(error)}): check that it was started, then run the same command again"
        ) from error


def rendezvous(store: Store, rank: int, size: int, limit: float) -> str:
    """Wait until all ranks are there. Returns the name of this generation of ranks: the same on
    every rank, and different after every restart. Raises `UserError` that names the missing ranks
    after `limit` seconds (0: no limit).

    torchrun keeps its store when it restarts the ranks. The name prefixes this generation's keys,
    because gloo would otherwise find the addresses of dead ranks and connect to those. torchrun's
    restart count cannot be the prefix: each host counts its own restarts.
    """
    keys = [f"rekindle/{r}" for r in range(size)]
    store.set(keys[rank], os.urandom(8).hex())
    start_time = time.monotonic()
    while True:
        arrivals = keys
        if store.check(keys):
            generation = "rekindle/" + "-".join(store.get(key).decode() for key in keys)
            arrivals = [f"{generation}/{r}" for r in range(size)]
            store.set(arrivals[rank], "arrived")
            # A token may be left from a dead rank: the name is valid once every rank arrives at it.
            if store.check(arrivals):
                return generation
        if limit and time.monotonic() - start_time > limit:
            missing = [str(r) for r, key in enumerate(arrivals) if not store.check([key])]
            raise UserError(
                f"waited {limit:.0f} s for all {size} ranks to connect: {', '.join(missing)} did "
                "not come; check that they were started, then run the same command again"
            )
        time.sleep(0.05)


def reason(error: Exception) -> str:
    """The first sentence of torch's error message, without its position in the source."""
    line = str(error).splitlines()[0]
    return re.sub(r"\[\S*/\S*\] ", "", line).partition(". ")[0]
