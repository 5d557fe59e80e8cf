"""Checkpoints are written while training goes on: the loop copies, a thread writes."""

import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from rekindle.errors import UserError
from rekindle.observe.metrics import Metrics
from rekindle.optim import Optimizer
from rekindle.runtime import checkpoint
from rekindle.runtime.checkpoint import Keep, Snapshot
from rekindle.runtime.distributed import World
from rekindle.runtime.sharding import is_sharded

PAUSES = (1.0, 4.0)  # seconds before a disk that failed is tried again; then at the next save


class Saver:
    """Writes a run's checkpoints, one at a time, in a thread; on the main rank alone.

    A checkpoint is told of (metrics, console) and older ones are dropped once it is whole. A disk
    that fails is tried again, and again with the next checkpoint: training goes on. Only `finish`,
    after the last one, raises what kept it from being saved.
    """

    def __init__(
        self, folder: Path, keep: Keep, model: nn.Module, optimizer: Optimizer,
        metrics: Metrics, world: World,
    ) -> None:  # fmt: skip
        self._folder, self._keep, self._metrics = folder, keep, metrics
        self._model, self._optimizer, self._world = model, optimizer, world
        self._snapshot = Snapshot(model, optimizer) if world.is_main else None
        if world.is_main:
            self._prune()  # a kill may have come before it was done
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, description: dict[str, Any]) -> None:
        """Begin the checkpoint of `description["step"]`, once the one before is whole.

        Its `stall_s` is how long this took. On a GPU the copies are only begun here: their time
        (at 25 GB/s, 60 ms for 124M parameters) is part of the next step's.
        """
        if self._snapshot is None:
            if is_sharded(self._model):  # the main rank needs the parts of all
                with self._gathering():
                    deque(checkpoint.whole_tensors(self._model, self._optimizer), maxlen=0)
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
            self._metrics.console.say("finishing the checkpoint under way")
            self._thread.join()

    def _write(self, description: dict[str, Any], stall: float) -> None:
        assert self._snapshot is not None
        step, began = description["step"], time.perf_counter()
        try:
            path = self._try_to_write(description)
            self._prune()
            seconds = time.perf_counter() - began
            self._metrics.record("checkpoint", step, seconds=seconds, stall_s=stall)
            self._metrics.console.say(
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
                    "it goes on from the newest checkpoint there"
                )
            self._metrics.console.say(f"step {step:>5} | saving failed: {reason}")

    def _prune(self) -> None:
        """Remove the checkpoints that need not be kept; one that cannot be removed harms nobody."""
        try:
            checkpoint.prune(self._folder, self._keep)
        except OSError as error:
            self._metrics.console.say(
                f"an old checkpoint cannot be removed: {error.strerror or error}"
            )

    def _try_to_write(self, description: dict[str, Any]) -> Path:
        """Write a checkpoint, in a few attempts if the disk fails."""
        assert self._snapshot is not None
        step = description["step"]
        for pause in PAUSES:
            try:
                return checkpoint.write(self._folder, description, self._snapshot)
            except OSError as error:
                reason = error.strerror or str(error)
                self._metrics.console.say(
                    f"step {step:>5} | saving failed: {reason}; once more in {pause:.0f} s"
                )
                time.sleep(pause)
        return checkpoint.write(self._folder, description, self._snapshot)
