"""Measurements of a run: a progress line for the console, and records for the loggers."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rekindle.errors import UserError
from rekindle.observe.console import Console, duration
from rekindle.observe.pace import Pace

RECORD = {"kind": str, "step": int}  # keys of every record


class Logger(Protocol):
    """A destination for the records of a run, such as `metrics.jsonl`. Called from any thread."""

    def write(self, record: dict[str, Any]) -> None:
        """Log one JSON object: `kind`, `step`, and the values of its kind."""
        ...

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """The run returned to an earlier step: drop the records for which `keep` is false."""
        ...

    def close(self) -> None:
        """The run has ended: no more records follow."""
        ...


class Metrics:
    """Computes the speed of each step, shows it, and passes records to the loggers.

    If a logger fails, the run continues and the failure is printed once.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        console: Console,
        *,
        steps: int,
        tokens_per_step: int,
        flops_per_token: int,
        peak_flops: float | None,
        log_every: int = 0,
        if_slow: str = "",
    ) -> None:
        """`loggers`: only on rank 0. `log_every`: steps between printed lines; 0: one every ten
        seconds. `if_slow`: advice to print when steps become much slower."""
        self._loggers = loggers
        self.console, self._steps = console, steps
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self._log_every, self._if_slow = log_every, if_slow
        self._pace = Pace()
        self._failed: set[int] = set()  # indices of the loggers whose last call failed

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        seconds: float,
        data_wait: float,
        skip_reason: str = "",
    ) -> None:
        """Report one optimizer step, numbered from 0. `seconds`: its own duration."""
        rate = self._tokens / seconds
        mfu = None if self._peak is None else rate * self._flops / self._peak
        self.record(
            "train",
            step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            skipped=bool(skip_reason),
            tokens=(step + 1) * self._tokens,
            tokens_per_s=rate,
            mfu=mfu,
            data_wait_s=data_wait,
            seconds=seconds,
        )
        self._pace.add(seconds)
        left = self._pace.left(self._steps - step - 1)  # None, or 0 at the end: nothing to show
        self._show(
            step,
            [  # most important first: a narrow terminal shows only the parts that fit
                f"step {step:>5}/{self._steps}",
                f"SKIPPED: {skip_reason}" if skip_reason else "",
                f"loss {loss:.4f}",
                f"{duration(left)} left" if left else "",
                f"{rate:,.0f} tok/s",
                "" if mfu is None else f"mfu {mfu:.1%}",
                f"lr {lr:.2e}",
                f"grad norm {grad_norm:.2f}",
                f"data {data_wait * 1e3:.1f} ms",
            ],
            important=step in (0, self._steps - 1) or bool(skip_reason),
        )

    def _show(self, step: int, parts: list[str], *, important: bool) -> None:
        """Show the line of a step, if it is due."""
        if self._log_every:
            important = important or step % self._log_every == 0
            if not important and not self.console.live:
                return
        self.console.progress(*filter(None, parts), important=important)
        if slowdown := self._pace.slowdown():
            before, now = map(duration, slowdown)
            self.console.print(f"note: a step now takes {now} instead of {before}{self._if_slow}")

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Log one object: `kind` is train, validation, samples, checkpoint, rollback or a task."""
        values = {k: _finite(v) for k, v in values.items()}
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._each(lambda logger: logger.write(dict(record)))

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records of steps that will be repeated.

        Raises `UserError` if a logger does: a log with repeated steps would mislead.
        """
        self._each(lambda logger: logger.rewind(keep), fatal=(UserError,))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(
        self, call: Callable[[Logger], None], fatal: tuple[type[Exception], ...] = ()
    ) -> None:
        """Call every logger. Print a line when one starts to fail, and when it works again."""
        for number, logger in enumerate(self._loggers):
            name = type(logger).__name__
            try:
                call(logger)
            except fatal:
                raise
            except Exception as error:  # any error of a logger's library
                if number not in self._failed:
                    self.console.print(
                        f"{name} failed, so records are missing ({type(error).__name__}: {error})"
                    )
                self._failed.add(number)
            else:
                if number in self._failed:
                    self.console.print(f"{name} works again; the missing records are lost")
                self._failed.discard(number)


def _finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
