"""A run in progress: its folder and trainer, and the evaluating, saving and logging around them.

`rekindle.start` creates a `Session`; the loop in `rekindle.train` uses it.
"""

import math
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

from rekindle.checkpoint import Saver
from rekindle.data import shards
from rekindle.errors import Stopped, UserError
from rekindle.evaluate.evaluator import Evaluator, InterruptedEvaluationError
from rekindle.observe.console import Console, duration
from rekindle.observe.metrics import Metrics
from rekindle.run import Run
from rekindle.runtime import replicas
from rekindle.runtime.distributed import World
from rekindle.runtime.signals import Listener
from rekindle.runtime.watchdog import Watchdog
from rekindle.train import StepResult
from rekindle.trainer import Trainer

MAX_ROLLBACKS = 3  # to the same checkpoint, before the run ends with an error


@dataclass
class Session:
    """Everything the training loop uses. A context manager: on exit, even after an error, it
    finishes the checkpoint being written and closes the log."""

    run: Run
    trainer: Trainer
    unchanged: shards.Unchanged
    metrics: Metrics
    saver: Saver
    evaluator: Evaluator
    watch: Watchdog
    console: Console
    validation: float | None = None  # validation loss of the last evaluation
    # Rollbacks per checkpoint step. Not saved: a resumed run would repeat them.
    rollbacks: Counter[int] = field(default_factory=Counter)
    signals: Listener = field(default_factory=Listener)
    evaluation_compiled: bool = False
    began: float = 0.0  # when the command was started; 0 once the first step is done

    @property
    def world(self) -> World:
        return self.trainer.world

    @property
    def evaluated(self) -> bool:
        """Whether the weights that the run starts with have been evaluated."""
        return self.run.evaluated

    def __post_init__(self) -> None:
        self.trainer.stop_signal = lambda: self.signals.signal
        self.evaluator.stop_requested = self.stop_requested

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.trainer.close()
        self.saver.close()
        self.metrics.close()
        if kind in (None, Stopped):
            self.world.barrier()  # so that the last checkpoint is complete before any rank returns
            self.world.close()
        self.watch.close()

    def warm_up(self) -> None:
        """Compile the training step and print how long it took. Does nothing if all steps are
        done."""
        if self.trainer.step >= self.trainer.recipe.steps:
            return
        compiled = self.trainer.machine.compile
        if compiled:
            self.console.progress("compiling the training step", passing=True)
        found = self.trainer.warm_up()
        memory = f", {found.peak_bytes / 2**30:.1f} GiB" if found.peak_bytes else ""
        self.console.print(
            f"{'compiled the training step' if compiled else 'warmed up'} in "
            f"{duration(found.compile_s)}; a micro-batch takes {duration(found.pass_s)}{memory}"
        )

    def log(self, result: StepResult, seconds: float, data_wait: float) -> None:
        """Log the step just taken. `seconds`: its duration; `data_wait`: seconds of it spent
        waiting for data."""
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
            elapsed = duration(time.perf_counter() - self.began)
            self.console.print(f"first step done {elapsed} after the start")
            self.began = 0.0

    def evaluate(self) -> None:
        """Evaluate the current weights, or stop as a signal asked: a resumed run evaluates them."""
        step = self.trainer.step
        self.trainer.at(f"the evaluation after step {step}")
        self.unchanged.check()
        self._compile_evaluation()
        try:
            self.validation = self.evaluator(step)
        except InterruptedEvaluationError:
            self.stop(self.stop_requested())
        self.unchanged.check()

    def _compile_evaluation(self) -> None:
        """Compile before the first evaluation, and print how long that took."""
        if not self.evaluation_compiled and self.trainer.machine.compile:
            self.console.progress("compiling the evaluation", passing=True)
            if seconds := self.evaluator.compile():
                self.console.print(f"compiled the evaluation in {duration(seconds)}")
        self.evaluation_compiled = True

    def evaluate_saved(self) -> None:
        """Evaluate the checkpoint that the run resumes from, if a stop signal prevented that."""
        self.evaluate()
        if self.world.is_main:
            self.run.amend(evaluated=True, validation_loss=self.validation)

    def check_end(self, loss: float) -> None:
        """Raise `UserError` if the final validation loss is not finite. `loss`: training loss of
        the last step, used if there is no validation split."""
        last = loss if self.validation is None else self.validation
        if not math.isfinite(last):
            raise UserError(
                f"the run ended with a loss of {last}, so its last step was not saved: lower "
                "--optim.lr and start again in a new --out"
            )

    def save(self, *, evaluated: bool) -> None:
        """Start a checkpoint, which is written in the background while training continues."""
        t = self.trainer
        t.at(f"the checkpoint of step {t.step}")
        t.compare_ranks()
        replicas.check_finite(t.model, t.optimizer, t.world, t.step)
        if self.world.is_main:
            with suppress(OSError):  # the saver reports a failing disk
                self.run.write_identity()  # again, if the folder was removed or hidden by a mount
        validation = self.validation if evaluated else None
        self.saver.save(self.run.describe(t.describe(), evaluated=evaluated, validation=validation))

    def stop_requested(self, result: StepResult | None = None) -> int:
        """The number of a stop signal that any rank has received; 0 if there is none.

        `result` is that of the step just taken: the ranks have reduced their signals together with
        its loss. Without `result` they communicate now.
        """
        if self.world.size == 1:
            return self.signals.signal
        if result is None:
            return self.world.max(self.signals.signal, self.trainer.device.torch)
        return result.stop_signal

    def stop(self, number: int) -> NoReturn:
        """Save a checkpoint and raise `Stopped`. `number`: the signal that requested it."""
        self.save(evaluated=False)
        self.saver.finish()
        name, step = signal.Signals(number).name, self.trainer.step
        when = f"after step {step - 1}" if step else "before the first step"
        raise Stopped(
            number,
            f"stopped by {name} {when}; a checkpoint was saved: run the same command to resume",
        )

    def roll_back(self) -> None:
        """After too many skipped steps, return to the last checkpoint before them and continue with
        the data after them."""
        t = self.trainer
        self.saver.close()  # ignores a failed save: an older checkpoint will do
        self.world.barrier()
        skipped = f"the {t.guard.skipped} steps before step {t.step} were skipped in a row"
        advice = "lower --optim.lr and start from scratch, or --fork an earlier checkpoint"
        if not self.run.find_rollback(self.world, t.device.torch):
            raise UserError(f"{skipped} and there is no checkpoint to roll back to: {advice}")
        saved = self.run.checkpoint
        assert saved
        self.rollbacks[saved.step] += 1
        if self.rollbacks[saved.step] > MAX_ROLLBACKS:
            raise UserError(
                f"{skipped} after {MAX_ROLLBACKS} rollbacks to step {saved.step}: {advice}"
            )
        last, batch = t.step - 1, t.batch
        t.restore(saved, batch=batch)
        first = saved.tokens_read // t.recipe.batch.tokens
        saved.model.clear()  # closes the file, so that the checkpoint can be removed later
        self.metrics.rewind(self.run.is_past)
        self.metrics.record("rollback", t.step, skipped_at=last, next_batch=batch)
        self.console.print(
            f"step {last:>5} | {skipped}: rolled back to step {t.step}, continuing with batch "
            f"{batch} (batches {first} to {batch - 1} are skipped)"
        )
