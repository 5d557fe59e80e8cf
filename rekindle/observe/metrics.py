"""What a run measures: the progress line for people, records for the loggers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rekindle.errors import UserError
from rekindle.observe.console import Console, duration

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
    ) -> None:
        """`loggers`: none on all ranks but the first."""
        self._loggers = loggers
        self.console, self._steps = console, steps
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self._recent: list[float] = []  # seconds of the last steps
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
            tokens_per_s=rate,
            mfu=mfu,
            data_wait_s=data_wait,
            seconds=seconds,
        )
        self._recent = [*self._recent[-19:], seconds]
        typical = sorted(self._recent)[len(self._recent) // 2]
        left = duration(typical * (self._steps - step - 1))
        parts = [
            f"step {step:>5}/{self._steps}",
            f"loss {loss:.4f}",
            f"{left} left",
            f"lr {lr:.2e}",
            f"grad norm {grad_norm:.2f}",
            f"{rate:,.0f} tok/s",
            "" if mfu is None else f"mfu {mfu:.1%}",
            f"data {data_wait * 1e3:.1f} ms",
            f"SKIPPED: {skip_reason}" if skip_reason else "",
        ]
        self.console.progress(
            " | ".join(filter(None, parts)),
            important=step in (0, self._steps - 1) or bool(skip_reason),
        )

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Log one object: `kind` is train, validation, samples, checkpoint, rollback or a task."""
        record = {"kind": kind, "step": step, **{k: _finite(v) for k, v in values.items()}}
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
