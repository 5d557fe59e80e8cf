"""Checkpoints are written while training goes on: the loop copies, a thread writes."""

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
from rekindle.runtime.sharding import is_sharded, whole

PAUSES = (1.0, 4.0)  # seconds before a disk that failed is tried again; then at the next save


class Snapshot:
    """A model's parameters and its optimizer's state at one moment, in the CPU's memory.

    With AdamW it takes 12 bytes a parameter (1.5 GB for 124M) beside what training on a CPU needs.
    It is allocated when this is made, so that a lack of memory shows before the first step, and
    used again by every `take`. For a GPU it is pinned: only so does a copy run beside other work.
    """

    def __init__(self, model: HasParameters, optimizer: Optimizer) -> None:
        parameters = dict(model.named_parameters())
        self._pinned = next(iter(parameters.values())).is_cuda
        self.model = self._allocate(parameters)
        self.optimizer = self._allocate(optimizer.state_tensors())
        self._copied: torch.cuda.Event | None = None

    def _allocate(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Memory for tensors of these shapes and types: one piece a type, as pinning rounds up."""
        made: dict[str, Tensor] = {}
        for dtype in {tensor.dtype for tensor in named.values()}:
            same = {name: t for name, t in named.items() if t.dtype == dtype}
            sizes = [t.numel() for t in same.values()]
            flat = torch.empty(sum(sizes), dtype=dtype, pin_memory=self._pinned)
            flat.zero_()  # touched now, and not at a save
            pieces = zip(same.items(), flat.split(sizes), strict=True)
            made |= {name: piece.view(tensor.shape) for (name, tensor), piece in pieces}
        return made

    def take(self, model: HasParameters, optimizer: Optimizer) -> None:
        """Copy what is to be saved. On a GPU the copies are only begun, before whatever the GPU is
        given to do next; after `wait` they are whole. If the model is sharded, the other ranks run
        through `whole_tensors` meanwhile."""
        targets = {**self.model, **self.optimizer}
        for name, tensor in whole_tensors(model, optimizer):
            targets[name].copy_(tensor, non_blocking=self._pinned)
        if self._pinned:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        if self._copied:
            self._copied.synchronize()


def whole_tensors(model: HasParameters, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds, under its names there: one after the other, each of them whole."""
    for name, p in model.named_parameters():
        yield name, whole(p.detach())
    for name, tensor in optimizer.state_tensors().items():
        yield name, whole(tensor)


def write(folder: Path, description: Description, snapshot: Snapshot) -> Path:
    """Write the checkpoint of `description.step` under `folder`; return its path."""
    snapshot.wait()
    path = folder / f"step-{description.step:06d}"
    with storage.new_folder(path) as new:
        for name, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            new.write_tensors(f"{name}.safetensors", arrays)
        new.write_json(DESCRIPTION, _signed(description, dict(new.files)))
    return path


def amend(saved: Checkpoint, **changes: Any) -> Checkpoint:
    """Change what a checkpoint says of itself, on disk; it stays whole meanwhile. Returns it."""
    file = saved.path / DESCRIPTION
    files = storage.read_json(file, {"files": dict})["files"]
    description = dataclasses.replace(saved.description, **changes)
    storage.write_json(file, _signed(description, files))
    return dataclasses.replace(saved, description=description)


def _signed(description: Description, files: dict[str, Any]) -> dict[str, Any]:
    """A description as it is written: with its format, its files and its own hash."""
    unsigned = {"format": FORMAT, **dataclasses.asdict(description), "files": files}
    if description.updates is None:
        del unsigned["updates"]
    return {**unsigned, "sha256": description_sha256(unsigned)}


def save(
    folder: Path, description: Description, model: HasParameters, optimizer: Optimizer, world: World
) -> Path:
    """Write one checkpoint at once, in the place of one of the same step; on every rank together.
    Returns its path."""
    path = folder / f"step-{description.step:06d}"
    if world.is_main:
        storage.make_folder(folder)
        snapshot = Snapshot(model, optimizer)
        snapshot.take(model, optimizer)
        write(folder, description, snapshot)
    elif is_sharded(model):
        deque(whole_tensors(model, optimizer), maxlen=0)
    world.barrier()
    return path


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread; on the main rank alone.

    A checkpoint is told of (metrics, console) and older ones are dropped once it is whole. A disk
    that fails is tried again, and again with the next checkpoint: training goes on. Only `finish`,
    after the last one, raises what kept it from being saved.
    """

    def __init__(
        self, folder: Path, keep: Keep, model: HasParameters, optimizer: Optimizer,
        metrics: Metrics, world: World,
    ) -> None:  # fmt: skip
        self._folder, self._keep, self._metrics = folder, keep, metrics
        self._model, self._optimizer, self._world = model, optimizer, world
        self._snapshot = Snapshot(model, optimizer) if world.is_main else None
        if world.is_main:
            self._prune()  # a kill may have come before it was done
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, description: Description) -> None:
        """Begin the checkpoint of `description.step`, once the one before is whole.

        Its `stall_s` is how long this took. On a GPU the copies are only begun here: their time
        (at 25 GB/s, 60 ms for 124M parameters) is part of the next step's.
        """
        if self._snapshot is None:
            if is_sharded(self._model):  # the main rank needs the parts of all
                with self._gathering():
                    deque(whole_tensors(self._model, self._optimizer), maxlen=0)
            return
        began = time.perf_counter()
        if self._thread:
            self._thread.join()  # there is one snapshot
        if self._failure and not isinstance(self._failure, UserError):
            raise self._failure  # a bug of ours
        self._failure = None
        with self._gathering():
            self._snapshot.take(self._model, self._optimizer)
        stall = time.perf_counter() - began
        # No daemon: the process does not end before it, even if `close` is interrupted.
        self._thread = threading.Thread(target=self._write, args=(description, stall))
        self._thread.start()

    def _gathering(self) -> AbstractContextManager[None]:
        """For the watchdog: the ranks need each other if each holds a part."""
        return self._world.together() if is_sharded(self._model) else nullcontext()

    def finish(self) -> None:
        """Wait for the checkpoint under way. Raises `UserError` if it could not be saved."""
        if self._thread:
            self._thread.join()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Wait for the checkpoint under way, whatever becomes of it."""
        if self._thread and self._thread.is_alive():
            self._metrics.console.print("finishing the checkpoint under way")
            self._thread.join()

    def _write(self, description: Description, stall: float) -> None:
        assert self._snapshot is not None
        step, began = description.step, time.perf_counter()
        try:
            path = self._try_to_write(description)
            self._prune()
            seconds = time.perf_counter() - began
            self._metrics.record("checkpoint", step, seconds=seconds, stall_s=stall)
            self._metrics.console.print(
                f"step {step:>5} | saved {path} ({seconds:.1f} s, training waited {stall:.2f} s)"
            )
        except BaseException as error:  # raised again by the training thread, in `finish`
            self._failure = error
            reason = repr(error)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                self._failure = UserError(
                    f"saving the checkpoint of step {step} in {self._folder} failed ({reason}): "
                    "make room or see that it may be written to, then give the same command again; "
                    "it resumes from the newest checkpoint there"
                )
            self._metrics.console.print(f"step {step:>5} | saving failed: {reason}")

    def _prune(self) -> None:
        """Remove the checkpoints that need not be kept; one that cannot be removed harms nobody."""
        try:
            prune(self._folder, self._keep)
        except OSError as error:
            self._metrics.console.print(
                f"an old checkpoint cannot be removed: {error.strerror or error}"
            )

    def _try_to_write(self, description: Description) -> Path:
        """Write a checkpoint, in a few attempts if the disk fails."""
        assert self._snapshot is not None
        step = description.step
        for pause in PAUSES:
            try:
                return write(self._folder, description, self._snapshot)
            except OSError as error:
                reason = error.strerror or str(error)
                self._metrics.console.print(
                    f"step {step:>5} | saving failed: {reason}; once more in {pause:.0f} s"
                )
                time.sleep(pause)
        return write(self._folder, description, self._snapshot)
