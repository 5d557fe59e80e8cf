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
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from rekindle.errors import UserError

_LAUNCHER = (
    "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT belong together, so start the ranks "
    "with torchrun, set all of them, or unset all of them"
)
PATIENCE = 600.0  # seconds that a rank waits for the others, unless told else


class Location:
    """Where a rank stands in the program, for the watchdog to tell."""

    def __init__(self) -> None:
        self._text, self._waiting_since = "the start", 0.0

    def at(self, text: str) -> None:
        """This rank has come to `text` and waits for nobody."""
        self._text, self._waiting_since = text, 0.0

    def start_waiting(self) -> None:
        """It has given its part and needs the others'. On a GPU it goes on in the meantime, and
        only the next `at` shows that they came."""
        self._waiting_since = time.monotonic()

    def stop_waiting(self) -> None:
        self._waiting_since = 0.0

    def waited(self) -> float:
        """Seconds since `start_waiting`; 0 if it does not wait."""
        return time.monotonic() - self._waiting_since if self._waiting_since else 0.0

    def now(self) -> str:
        return f"waiting in {self._text}" if self._waiting_since else self._text


@dataclass(frozen=True)
class World:
    """This process' place among all. Alone, every operation here does nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    location: Location = field(default_factory=Location, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Add each tensor over all ranks, in place."""
        if self.size > 1:
            with self.together(done=dist.get_backend() == "gloo"):
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def mean_(self, tensor: Tensor) -> None:
        """Make `tensor` its mean over all ranks, in place."""
        self.sum_(tensor)
        tensor /= self.size

    def max_(self, tensor: Tensor) -> None:
        """Make `tensor` its maximum over all ranks, in place. Does not wait for a GPU."""
        if self.size > 1:
            with self.together(done=dist.get_backend() == "gloo"):
                dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def min(self, value: int, device: torch.device) -> int:
        """The smallest `value` any rank has."""
        return -self.max(-value, device)

    def max(self, value: int, device: torch.device) -> int:
        """The largest `value` any rank has."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=device)
        with self.together():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return int(tensor)

    def agree(self, value: int, meaning: str, advice: str, device: torch.device) -> None:
        """Raise `UserError` on every rank unless all have the same `value`."""
        least, most = self.min(value, device), self.max(value, device)
        if least != most:
            raise UserError(
                f"the ranks do not agree: to this one {meaning} {value}, to others it is "
                f"{least if value == most else most}; {advice}"
            )

    def totals(self, values: Tensor) -> list[float]:
        """`values` added up over all ranks, when all of them have come."""
        self.sum_(values)
        totals = values.tolist()
        self.location.stop_waiting()
        return totals

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in order; all have one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.together():
            dist.all_gather(found, tensor)
            return [each.cpu() for each in found]

    def barrier(self) -> None:
        if self.size > 1:
            with self.together():
                dist.barrier()

    @contextmanager
    def together(self, *, done: bool = True) -> Iterator[None]:
        """Something that needs every rank. `done`: it is over when the body is; NCCL's sums are
        only begun there."""
        self.location.start_waiting()
        with explaining_lost_ranks():
            yield
        if done:
            self.location.stop_waiting()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def data_parallel(module: nn.Module, world: World, device: torch.device) -> nn.Module:
    """`module` (compiled or not) as several ranks call it in training: PyTorch's
    `DistributedDataParallel`, which averages gradients over the ranks. Alone, `module` itself."""
    if world.size == 1:
        return module
    with world.together():
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )


@contextmanager
def gradient_sync(forward: object, world: World, *, now: bool) -> Iterator[None]:
    """A forward and backward pass, in which DDP averages the gradients only if it is `now`."""
    if not isinstance(forward, DistributedDataParallel):
        yield
    elif now:
        with world.together(done=dist.get_backend() == "gloo"):
            yield
    else:
        with forward.no_sync():
            yield


def get_world() -> World:
    """Where torchrun, or another launcher, put this process; alone without one.

    Raises `UserError` unless the launcher's variables are all there, or none of the three that
    number the ranks (a cluster may always set the address of its first host).
    """
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not any(number is not None for number in numbers.values()):
        return World()
    rank, local_rank, size = (_number_of_launcher(name, text) for name, text in numbers.items())
    if not 0 <= rank < size or not 0 <= local_rank < size:
        raise UserError(
            f"RANK {rank} and LOCAL_RANK {local_rank} must be below WORLD_SIZE {size}: see how the "
            "ranks were started"
        )
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            _launcher_says(name, os.environ.get(name))
        _number_of_launcher("MASTER_PORT", os.environ.get("MASTER_PORT"))
    return World(rank=rank, size=size, local_rank=local_rank)


def _number_of_launcher(name: str, text: str | None) -> int:
    text = _launcher_says(name, text)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{name} is {text!r}, which is not a whole number: {_LAUNCHER}")
    return int(text)


def _launcher_says(name: str, text: str | None) -> str:
    if not text:
        raise UserError(f"{name} is {'missing' if text is None else 'empty'}: {_LAUNCHER}")
    return text


@contextmanager
def explaining_lost_ranks() -> Iterator[None]:
    """In here ranks talk to each other. Raises `UserError` when one is gone, and lets all else
    through."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):  # that has no class
            raise
        raise UserError(
            f"lost touch with another rank ({reason(error)}): what ended it says so itself; the "
            "same command resumes from the newest checkpoint"
        ) from error


def connect(world: World, device: torch.device, limit: float = PATIENCE) -> str:
    """Join the other processes: NCCL between GPUs, gloo between CPUs. Returns the name of this life
    of theirs. `limit` is for `meet`, and the watchdog's: torch itself gives up later, and never
    while one rank compiles and the others wait.
    """
    if world.size == 1 or dist.is_initialized():
        return ""
    on_gpu = device.type == "cuda"
    timeout = timedelta(seconds=max(1800, 2 * limit)) if limit else timedelta(days=365)
    try:
        store = _open_store(world, timedelta(seconds=limit) if limit else timeout)
        store.set_timeout(timeout)
        life = meet(store, world.rank, world.size, limit)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=PrefixStore(life, store), timeout=timeout,
            rank=world.rank, world_size=world.size, device_id=device if on_gpu else None,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:  # the last if torchrun's variables are missing
        raise UserError(
            f"the ranks did not meet ({reason(error)}): what kept another one away it says itself; "
            "give the same command again"
        ) from error
    return life


def _open_store(world: World, timeout: timedelta) -> Store:
    """The store through which the ranks meet: torchrun's, or else one that rank 0 opens. Nobody
    waits for the others here, which `meet` does, and names those that are missing."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return TCPStore(
            host,
            port,
            is_master=world.is_main and not is_torchruns,
            timeout=timeout,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        where = f"MASTER_ADDR {host}, MASTER_PORT {port}"
        if world.is_main and not is_torchruns:
            raise UserError(
                f"the ranks cannot meet at {where} ({reason(error)}): the port may be in use, so "
                "give all ranks another MASTER_PORT"
            ) from error
        raise UserError(
            f"rank 0 did not come to {where} within {timeout.total_seconds():.0f} s "
            f"({reason(error)}): see what keeps it, and give the same command again"
        ) from error


def meet(store: Store, rank: int, size: int, limit: float) -> str:
    """Wait for all ranks. Returns a name that they share and that no ranks before them had. Raises
    `UserError` that names those which have not come after `limit` seconds (0: waits for ever).

    torchrun keeps its store when it begins anew, and with it the addresses of those that died, to
    which gloo would connect. Its count of restarts is no such name: each host has its own.
    """
    keys = [f"rekindle/{r}" for r in range(size)]
    store.set(keys[rank], os.urandom(8).hex())
    began = time.monotonic()
    while True:
        met = keys
        if store.check(keys):
            life = "rekindle/" + "-".join(store.get(key).decode() for key in keys)
            met = [f"{life}/{r}" for r in range(size)]  # in a life that may have a rank that died
            store.set(met[rank], "met")
            if store.check(met):  # they read the same, so it is new
                return life
        if limit and time.monotonic() - began > limit:
            missing = [str(r) for r, key in enumerate(met) if not store.check([key])]
            raise UserError(
                f"waited {limit:.0f} s for all {size} ranks to meet: {', '.join(missing)} did not "
                "come; see what keeps them, and give the same command again"
            )
        time.sleep(0.05)


def reason(error: Exception) -> str:
    """What torch says, without the line of its source and its advice."""
    line = str(error).splitlines()[0]
    return re.sub(r"\[\S*/\S*\] ", "", line).partition(". ")[0]
