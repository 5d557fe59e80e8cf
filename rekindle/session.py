"""A run in memory: its folder, its trainer, and what evaluates, saves and logs around them.

`rekindle.start` builds one, and the loop in `rekindle.train` works with it.
"""

import math
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

from rekindle.checkpoint import Saver
from rekindle.data import shards
from rekindle.errors import Stopped, UserError
from rekindle.evaluate.evaluator import Evaluator
from rekindle.observe.console import Console, duration
from rekindle.observe.metrics import Metrics
from rekindle.run import Run
from rekindle.runtime import replicas
from rekindle.runtime.distributed import World
from rekindle.runtime.signals import Listener
from rekindle.runtime.watchdog import Watchdog
from rekindle.train import StepResult
from rekindle.trainer import Trainer

GIVE_UP_AFTER = 3  # rollbacks to the same checkpoint


@dataclass
class Session:
    """What the training loop works with. Used as a context: however it is left, a checkpoint being
    written is finished and the log is closed."""

    run: Run
    trainer: Trainer
    unchanged: shards.Unchanged
    metrics: Metrics
    saver: Saver
    evaluator: Evaluator
    watch: Watchdog
    console: Console
    validation: float | None = None  # loss of the last evaluation
    # Rollbacks per checkpoint step. Not saved: a resumed run would repeat them.
    rollbacks: Counter[int] = field(default_factory=Counter)
    signals: Listener = field(default_factory=Listener)
    began: float = 0.0  # of the start, until the first step is done

    def __post_init__(self) -> None:
        self.trainer.stop_signal = lambda: self.signals.signal

    @property
    def world(self) -> World:
        return self.trainer.world

    @property
    def evaluated(self) -> bool:
        """Whether the weights it starts with have been evaluated."""
        return self.run.evaluated

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.trainer.close()
        self.saver.close()
        self.metrics.close()
        if kind in (None, Stopped):
            self.world.barrier()  # on every rank the last checkpoint is whole from here on
            self.world.close()
        self.watch.close()

    def warm_up(self) -> None:
        """Compile, and say how long it took, if there is a step to take."""
        if self.trainer.step >= self.trainer.recipe.steps:
            return
        found = self.trainer.warm_up()
        memory = f", {found.peak_bytes / 2**30:.1f} GiB" if found.peak_bytes else ""
        self.console.print(
            f"warm-up: {duration(found.compile_s)} to compile and settle, then "
            f"{found.pass_s * 1e3:.0f} ms a micro-batch{memory}"
        )

    def log(self, result: StepResult, seconds: float, data_wait: float) -> None:
        """Report the step just taken."""
        self.metrics.step(
            self.trainer.step - 1,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            skip_reason=self.trainer.guard.reason,
            seconds=seconds,
            data_wait=data_wait,
        )
        if self.began:
            took = duration(time.perf_counter() - self.began)
            self.console.print(f"first step done {took} after the start")
            self.began = 0.0

    def evaluate(self) -> None:
        """Evaluate the weights as they are."""
        step = self.trainer.step
        self.trainer.at(f"the evaluation after step {step}")
        self.unchanged.check()
        self.validation = self.evaluator(step)
        self.unchanged.check()

    def evaluate_saved(self) -> None:
        """Evaluate the checkpoint it resumes from, which was saved in a hurry, to stop."""
        self.evaluate()
        if self.world.is_main:
            self.run.amend(evaluated=True, validation_loss=self.validation)

    def check_end(self, loss: float) -> None:
        """Raise `UserError` if the run ends with weights whose loss is not finite. `loss`: of the
        last step, which decides where there is no validation split."""
        last = loss if self.validation is None else self.validation
        if not math.isfinite(last):
            raise UserError(
                f"the run ends with a loss of {last}, so its last step was not saved: lower "
                "--optim.lr and start anew in another --out"
            )

    def save(self, *, evaluated: bool) -> None:
        """Begin a checkpoint; it is written while training continues."""
        t = self.trainer
        t.at(f"the checkpoint of step {t.step}")
        t.compare_ranks()
        replicas.check_finite(t.model, t.optimizer, t.world, t.step)
        validation = self.validation if evaluated else None
        self.saver.save(self.run.describe(t.describe(), evaluated=evaluated, validation=validation))

    def stop_requested(self, result: StepResult) -> int:
        """The number of the signal that asked any rank to stop; 0 if none did. Several ranks agree
        by what the step they just took carried with its loss."""
        return result.stop_signal if self.world.size > 1 else self.signals.signal

    def stop(self, number: int) -> NoReturn:
        """Save what is there, and end the run as a signal asked."""
        self.save(evaluated=False)
        self.saver.finish()
        name, step = signal.Signals(number).name, self.trainer.step
        raise Stopped(
            number,
            f"stopped by {name} after step {step - 1}, and everything is saved: the same command "
            "resumes the run",
        )

    def roll_back(self) -> None:
        """After too many skipped steps: return to the checkpoint before them, and continue with the
        data after them."""
        t = self.trainer
        self.saver.close()  # a disk that failed is no reason to end: there are older ones
        self.world.barrier()
        skipped = f"the {t.guard.skipped} steps before step {t.step} were skipped in a row"
        advice = "lower --optim.lr and start anew, or fork an earlier checkpoint"
        if not self.run.find_rollback(self.world, t.device.torch):
            raise UserError(f"{skipped} and there is no checkpoint to roll back to: {advice}")
        saved = self.run.checkpoint
        assert saved
        self.rollbacks[saved.step] += 1
        if self.rollbacks[saved.step] > GIVE_UP_AFTER:
            raise UserError(
                f"{skipped}, though the run rolled back to step {saved.step} before: {advice}"
            )
        last, batch = t.step - 1, t.batch
        t.restore(saved, batch=batch)
        first = saved.tokens_read // t.recipe.batch.tokens
        saved.model.clear()  # or its file stays open, even once the checkpoint is removed
        self.metrics.rewind(self.run.is_past)
        self.metrics.record("rollback", t.step, skipped_at=last, next_batch=batch)
        self.console.print(
            f"step {last:>5} | {skipped}: rolled back to step {t.step}, continuing with batch "
            f"{batch} (batches {first} to {batch - 1} are left out)"
        )
