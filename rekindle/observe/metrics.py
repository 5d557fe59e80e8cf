"""What a run measures: the progress line for people, records for the loggers."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rekindle.errors import UserError
from rekindle.observe.console import Console, duration
from rekindle.observe.pace import Pace

RECORD = {"kind": str, "step": int}  # what every line of the log has


class Logger(Protocol):
    """Where the records of a run go, such as its `metrics.jsonl`, from any thread."""

    def write(self, record: dict[str, Any]) -> None:
        """Log one object that JSON can hold: `kind`, `step`, and the values of its kind."""
        ...

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """The run returned to an earlier step: drop every record that `keep` refuses."""
        ...

    def close(self) -> None:
        """The run ends, and nothing more will be written."""
        ...


class Metrics:
    """Times the steps of a run, shows them, and gives them to its loggers.

    A logger that fails does not end the run: the console says so once.
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
        """`loggers`: none on all ranks but the first. `log_every`: steps between printed lines;
        0: one now and then. `if_slow`: what to try when steps become much slower."""
        self._loggers = loggers
        self.console, self._steps = console, steps
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self._log_every, self._if_slow = log_every, if_slow
        self._pace = Pace()
        self._failed: set[int] = set()  # numbers of the loggers that failed last time

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
        """Report one optimizer step, numbered from 0 (the time is that of the step alone)."""
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
            [  # what matters most comes first: a narrow terminal shows as many as fit
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
        """The line of a step, if it is due."""
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
        """Drop what was logged of steps that are taken again.

        Raises `UserError` where a logger does: a log that holds a step twice would mislead.
        """
        self._each(lambda logger: logger.rewind(keep), fatal=(UserError,))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(
        self, call: Callable[[Logger], None], fatal: tuple[type[Exception], ...] = ()
    ) -> None:
        """Call every logger; say once that one fails, and once that it works again."""
        for number, logger in enumerate(self._loggers):
            name = type(logger).__name__
            try:
                call(logger)
            except fatal:
                raise
            except Exception as error:  # whatever a logger's own library raises
                if number not in self._failed:
                    self.console.print(
                        f"{name} failed and misses records ({type(error).__name__}: {error})"
                    )
                self._failed.add(number)
            else:
                if number in self._failed:
                    self.console.print(f"{name} works again; what it missed is lost")
                self._failed.discard(number)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None stands for them."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
