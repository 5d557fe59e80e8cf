"""One rank of a test: it trains, records what it trained on, and injects faults.

A fault is {"rank": 1, "step": 5, "do": NAME of a method below, ...}. It happens once, before that
step, in the first life of the ranks, or after torchrun has restarted them (`"life": 1`).
"""

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rekindle import start as starting
from rekindle import trainer
from rekindle.checkpoint import Description
from rekindle.cli import main
from rekindle.data.batches import Batches
from rekindle.model.compute import Forward
from rekindle.runtime import watchdog
from rekindle.runtime.signals import Listener
from rekindle.session import Session
from rekindle.train import StepResult


class Rank:
    """Wraps the functions that the training loop calls."""

    step = 0
    session: Session
    listener: Listener

    def __init__(self, faults: list[dict[str, Any]], notes: Path) -> None:
        self.number = int(os.environ["RANK"])
        self.life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        rank = self
        mine = [f for f in faults if (f["rank"], f.get("life", 0)) == (self.number, self.life)]
        self.faults, self.notes = mine, notes
        self.start, self.learning_rate = starting.start, trainer.learning_rate
        self.train_step, self.batch = trainer.train_step, Batches.batch
        starting.start, trainer.learning_rate = self.started, self.before_step
        trainer.train_step, starting.Listener = self.noted_step, self.listening
        Batches.batch = lambda self, step, part: rank.read(self, step, part)  # type: ignore

    def started(self, *arguments: Any) -> Session:
        self.session = self.start(*arguments)
        save = self.session.saver.save
        self.session.saver.save = lambda description: self.sleep_before(save, description)
        return self.session

    @property
    def model(self) -> Any:
        return self.session.trainer.model

    def listening(self) -> Listener:
        self.listener = Listener()
        return self.listener

    def before_step(self, step: int, **options: Any) -> float:
        self.step = step
        for name in ("send_signal", "interrupt", "die", "freeze", "flip", "shell"):
            for fault in self.pop_faults(name):
                getattr(self, name)(**fault)
        return self.learning_rate(step, **options)

    def pop_faults(self, name: str, step: int | None = None) -> list[dict[str, Any]]:
        """Remove and return the arguments of the faults of this kind that are due."""
        step = self.step if step is None else step
        due = [f for f in self.faults if (f["do"], f["step"]) == (name, step)]
        self.faults = [f for f in self.faults if f not in due]
        return [
            {k: v for k, v in f.items() if k not in ("rank", "step", "do", "life")} for f in due
        ]

    def noted_step(
        self,
        forward: Forward,
        parameters: Any,
        optimizer: Any,
        x: Tensor,
        y: Tensor,
        **options: Any,
    ) -> StepResult:
        before = self.state()
        with contextlib.ExitStack() as faults:
            if self.pop_faults("nan"):
                faults.enter_context(self.changed_loss(lambda loss: loss * math.nan))
            if self.pop_faults("infinite_gradient"):
                faults.enter_context(self.changed_loss(_with_infinite_gradient))
            result = self.train_step(forward, parameters, optimizer, x, y, **options)
        note = {
            "step": self.step, "life": self.life, "rows": torch.cat([x, y[..., -1:]], -1).tolist(),
            "before": before, "after": self.state(), "skipped": result.skipped,
        }  # fmt: skip
        with open(self.notes / f"rank-{self.number}.jsonl", "a") as file:
            file.write(json.dumps(note) + "\n")
        return result

    @contextlib.contextmanager
    def changed_loss(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Change the model's loss within this context."""
        hook = self.model.register_forward_hook(lambda _, x, out: (out[0], change(out[1])))
        try:
            yield
        finally:
            hook.remove()

    def state(self) -> str:
        """A hash of all weights and optimizer state, or of this rank's part of them."""
        model, optimizer = self.model, self.session.trainer.optimizer
        sha256 = hashlib.sha256()
        for tensor in (*model.parameters(), *optimizer.state_tensors().values()):
            part = getattr(tensor, "_local_tensor", tensor)
            sha256.update(part.detach().numpy().tobytes())
        return sha256.hexdigest()

    def read(self, batches: Batches, number: int, partition: Any) -> tuple[np.ndarray, np.ndarray]:
        for fault in self.pop_faults("sleep_in_batch", number):
            time.sleep(fault["seconds"])
        return self.batch(batches, number, partition)

    def sleep_before(self, save: Callable, description: Description) -> None:
        for fault in self.pop_faults("sleep_in_save", description.step):
            time.sleep(fault["seconds"])
        save(description)

    # Faults:

    def send_signal(self, number: int, target: str) -> None:
        """Send a signal to this rank, or to its torchrun."""
        os.kill(os.getpid() if target == "rank" else os.getppid(), number)
        self.wait_until_signalled()

    def interrupt(self) -> None:
        """Ctrl-C at a terminal: torchrun and all its children receive SIGINT from the terminal, and
        the children receive it again from torchrun."""
        parent = os.getppid()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for process in (parent, *map(int, children)):
            os.kill(process, signal.SIGINT)
        self.wait_until_signalled()

    def wait_until_signalled(self) -> None:
        while not self.listener.signal:
            time.sleep(0.01)

    def die(self, after: str) -> None:
        """Die by SIGKILL once the checkpoint of that name exists."""
        while not (self.session.run.folder / "checkpoints" / after).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all threads, after the watchdog has reported this step to the other ranks."""
        time.sleep(2 * watchdog.TICK)
        os.kill(os.getpid(), signal.SIGSTOP)

    def flip(self, what: str, name: str, bit: int) -> None:
        """Flip a bit of one number."""
        if what == "weight":
            tensor = self.model.get_parameter(name).detach()
        else:
            tensor = self.session.trainer.optimizer.state_tensors()[f"{what}.{name}"]
        tensor.view(torch.int32).view(-1)[0] ^= 1 << bit

    def shell(self, command: str) -> None:
        subprocess.run(command, shell=True, check=True)


def _with_infinite_gradient(loss: Tensor) -> Tensor:
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def work(faults: str, notes: str, *arguments: str) -> int:
    """Run rekindle as a rank. `{rank}` in an argument is replaced by this process' rank."""
    watchdog.TICK = 0.5  # as on a fast network
    rank = Rank(json.loads(faults), Path(notes))
    return main([a.format(rank=rank.number) for a in arguments])
