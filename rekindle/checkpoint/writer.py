"""Writes checkpoints in the background: the training loop copies the state, a thread writes it."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rekindle import storage
from rekindle.checkpoint.format import (
    DESCRIPTION,
    FORMAT,
    Checkpoint,
    Description,
    description_sha256,
)
from rekindle.checkpoint.retention import Keep, prune
from rekindle.errors import UserError
from rekindle.model import HasParameters
from rekindle.observe.metrics import Metrics
from rekindle.optim import Optimizer
from rekindle.runtime.distributed import World
from rekindle.runtime.sharding import full_tensor, is_sharded

RETRY_DELAYS = (1.0, 4.0)  # seconds before each retry of a failed write


class Snapshot:
    """A copy of the model's parameters and the optimizer state in CPU memory.

    With AdamW it takes 12 bytes per parameter (1.5 GB for 124M parameters). The memory is allocated
    once, so that running out of memory shows before the first step, and reused by every `take`. If
    the model is on a GPU, the memory is pinned, so that copies overlap with computation.
    """

    def __init__(self, model: HasParameters, optimizer: Optimizer) -> None:
        parameters = dict(model.named_parameters())
        self._pinned = next(iter(parameters.values())).is_cuda
        self.model = self._allocate(parameters)
        self.optimizer = self._allocate(optimizer.state_tensors())
        self._copied: torch.cuda.Event | None = None

    def _allocate(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Allocate tensors of the same shapes and types: one block per type, because pinning rounds
        sizes up."""
        allocated: dict[str, Tensor] = {}
        for dtype in {tensor.dtype for tensor in named.values()}:
            same = {name: t for name, t in named.items() if t.dtype == dtype}
            sizes = [t.numel() for t in same.values()]
            flat = torch.empty(sum(sizes), dtype=dtype, pin_memory=self._pinned)
            flat.zero_()  # touches the pages now, not during the first save
            pieces = zip(same.items(), flat.split(sizes), strict=True)
            allocated |= {name: piece.view(tensor.shape) for (name, tensor), piece in pieces}
        return allocated

    def take(self, model: HasParameters, optimizer: Optimizer) -> None:
        """Copy the current state. From a GPU the copies are only enqueued, ahead of later work;
        `wait` waits for them. If the model is sharded, the other ranks must iterate over
        `full_tensors` at the same time."""
        targets = {**self.model, **self.optimizer}
        for name, tensor in full_tensors(model, optimizer):
            targets[name].copy_(tensor, non_blocking=self._pinned)
        if self._pinned:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Wait until the copies that `take` enqueued are done."""
        if self._copied:
            self._copied.synchronize()


def full_tensors(model: HasParameters, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a checkpoint, one at a time; sharded ones are gathered."""
    for name, p in model.named_parameters():
        yield name, full_tensor(p.detach())
    for name, tensor in optimizer.state_tensors().items():
        yield name, full_tensor(tensor)


def write(folder: Path, description: Description, snapshot: Snapshot) -> Path:
    """Write a checkpoint to `folder`/step-NNNNNN; return its path."""
    snapshot.wait()
    path = folder / f"step-{description.step:06d}"
    with storage.new_folder(path) as new:
        for name, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            new.write_tensors(f"{name}.safetensors", arrays)
        new.write_json(DESCRIPTION, _with_hash(description, dict(new.files)))
    return path


def amend(saved: Checkpoint, **changes: Any) -> Checkpoint:
    """Change fields of a checkpoint's description, atomically on disk. Returns the changed
    checkpoint."""
    file = saved.path / DESCRIPTION
    files = storage.read_json(file, {"files": dict})["files"]
    description = dataclasses.replace(saved.description, **changes)
    storage.write_json(file, _with_hash(description, files))
    return dataclasses.replace(saved, description=description)


def _with_hash(description: Description, files: dict[str, Any]) -> dict[str, Any]:
    """The contents of checkpoint.json: the description with the format, the files and a hash."""
    contents = {"format": FORMAT, **dataclasses.asdict(description), "files": files}
    if description.updates is None:
        del contents["updates"]
    return {**contents, "sha256": description_sha256(contents)}


def save(
    folder: Path, description: Description, model: HasParameters, optimizer: Optimizer, world: World
) -> Path:
    """Write one checkpoint, blocking, and replace any checkpoint of the same step. All ranks must
    call it together. Returns its path."""
    path = folder / f"step-{description.step:06d}"
    if world.is_main:
        storage.make_folder(folder)
        snapshot = Snapshot(model, optimizer)
        snapshot.take(model, optimizer)
        write(folder, description, snapshot)
    elif is_sharded(model):
        deque(full_tensors(model, optimizer), maxlen=0)
    world.barrier()
    return path


class Saver:
    """Writes a run's checkpoints one at a time in a thread, on the main rank only.

    Once a checkpoint is complete, it is logged and old ones are removed. If writing fails, it is
    retried, and training continues even if the retries fail too. Only `finish` raises the error,
    if the last checkpoint could not be saved.
    """

    def __init__(
        self, folder: Path, keep: Keep, model: HasParameters, optimizer: Optimizer,
        metrics: Metrics, world: World,
    ) -> None:  # fmt: skip
        self._folder, self._keep, self._metrics = folder, keep, metrics
        self._model, self._optimizer, self._world = model, optimizer, world
        self._snapshot = Snapshot(model, optimizer) if world.is_main else None
        if world.is_main:
            self._prune()  # a killed process may not have pruned
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, description: Description) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        The time this takes is logged as `stall_s`. On a GPU the copies are only enqueued here; the
        next step waits for them (60 ms for 124M parameters, at 25 GB/s).
        """
        if self._snapshot is None:
            if is_sharded(self._model):  # the main rank needs every rank's shards
                with self._gathering():
                    deque(full_tensors(self._model, self._optimizer), maxlen=0)
            return
        start_time = time.perf_counter()
        if self._thread:
            self._thread.join()  # it still uses the only snapshot
        if self._failure and not isinstance(self._failure, UserError):
            raise self._failure  # a bug in Rekindle
        self._failure = None
        with self._gathering():
            self._snapshot.take(self._model, self._optimizer)
        stall = time.perf_counter() - start_time
        # Not a daemon: the process waits for it to end, even if `close` is interrupted.
        self._thread = threading.Thread(target=self._write, args=(description, stall))
        self._thread.start()

    def _gathering(self) -> AbstractContextManager[None]:
        """Tells the watchdog that a sharded model needs all ranks to gather its tensors."""
        return self._world.collective() if is_sharded(self._model) else nullcontext()

    def finish(self) -> None:
        """Wait for the checkpoint in progress. Raises `UserError` if it could not be saved."""
        if self._thread:
            self._thread.join()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Wait for the checkpoint in progress, ignoring errors."""
        if self._thread and self._thread.is_alive():
            self._metrics.console.print("finishing the checkpoint in progress")
            self._thread.join()

    def _write(self, description: Description, stall: float) -> None:
        assert self._snapshot is not None
        step, start_time = description.step, time.perf_counter()
        try:
            path = self._write_with_retries(description)
            self._prune()
            seconds = time.perf_counter() - start_time
            self._metrics.record("checkpoint", step, seconds=seconds, stall_s=stall)
            self._metrics.console.print(
                f"step {step:>5} | saved {path} ({seconds:.1f} s, training waited {stall:.2f} s)"
            )
        except BaseException as error:  # `finish` raises it in the main thread
            self._failure = error
            reason = repr(error)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                self._failure = UserError(
                    f"saving the checkpoint of step {step} in {self._folder} failed ({reason}): "
                    "free some space or make the folder writable, then run the same command again; "
                    "it resumes from the newest checkpoint"
                )
            self._metrics.console.print(f"step {step:>5} | saving failed: {reason}")

    def _prune(self) -> None:
        """Remove old checkpoints. A failure is reported but does not stop the run."""
        try:
            prune(self._folder, self._keep)
        except OSError as error:
            self._metrics.console.print(
                f"an old checkpoint cannot be removed: {error.strerror or error}"
            )

    def _write_with_retries(self, description: Description) -> Path:
        """Write a checkpoint, retrying if the disk fails."""
        assert self._snapshot is not None
        step = description.step
        for delay in RETRY_DELAYS:
            try:
                return write(self._folder, description, self._snapshot)
            except OSError as error:
                reason = error.strerror or str(error)
                self._metrics.console.print(
                    f"step {step:>5} | saving failed: {reason}; retrying in {delay:.0f} s"
                )
                time.sleep(delay)
        return write(self._folder, description, self._snapshot)
