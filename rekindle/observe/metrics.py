"""The progress line for people and `metrics.jsonl` for machines."""

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from rekindle.storage import JsonLines

RECORD = {"kind": str, "step": int}  # what every line of the log has


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 42 s, 3 min 20 s, 5 h 07 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


class Console:
    """Prints for the main process only. On a terminal the progress line is rewritten in place;
    elsewhere a plain line comes now and then. Lines may come from several threads."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self._live = self._stream.isatty()
        self._pending = False  # a progress line is on the screen, without its end of line
        self._next = 0.0  # when the next progress line is due
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._quiet:
            return
        with self._lock:
            self._end_line()
            self._print(text + "\n")

    def progress(self, text: str, *, important: bool = False) -> None:
        """Show where things stand; `important` lines are shown in any case, and stay."""
        now = time.monotonic()
        if self._quiet or (now < self._next and not important):
            return
        self._next = now + (0.2 if self._live else 10.0)
        with self._lock:
            if not self._live:
                self._print(text + "\n")
                return
            text = text[: shutil.get_terminal_size().columns - 1]  # wrapped, it would stay
            self._print(f"\r\033[K{text}")
            self._pending = True
            if important:
                self._end_line()

    def _end_line(self) -> None:
        if self._pending:
            self._print("\n")
            self._pending = False

    def _print(self, text: str) -> None:
        """Nobody who reads, or no room where it goes: that is no reason for a training to end."""
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError:
            self._quiet = True
            # What is left in its buffer would fail once more when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Metrics:
    """Times the steps of a run, and logs them to its `metrics.jsonl`."""

    def __init__(
        self, log: JsonLines | None, console: Console, *, steps: int, tokens_per_step: int,
        flops_per_token: int, peak_flops: float | None,
    ) -> None:  # fmt: skip
        self._log, self.console, self._steps = log, console, steps
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self._recent: list[float] = []  # seconds of the last steps
        self._waiting = False  # lines that the disk did not take

    def step(
        self, step: int, *, loss: float, lr: float, norm: float, seconds: float, data_wait: float,
        objection: str = "",
    ) -> None:  # fmt: skip
        """Report one optimizer step, numbered from 0 (the time is that of the step alone)."""
        rate = self._tokens / seconds
        used = None if self._peak is None else rate * self._flops / self._peak
        self.record(
            "train", step, loss=loss, lr=lr, norm=norm, accepted=not objection, tokens_per_s=rate,
            utilisation=used, data_wait_s=data_wait, seconds=seconds,
        )  # fmt: skip
        self._recent = [*self._recent[-19:], seconds]
        typical = sorted(self._recent)[len(self._recent) // 2]
        left = duration(typical * (self._steps - step - 1))
        share = "unknown" if used is None else f"{used:.1%}"
        self.console.progress(
            f"step {step:>5}/{self._steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
            f"{rate:,.0f} tok/s | util {share} | data {data_wait * 1e3:.1f} ms | {left} left"
            + (f" | REFUSED: {objection}" if objection else ""),
            important=step in (0, self._steps - 1) or bool(objection),
        )

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Log one object: `kind` is train, validation, samples, checkpoint, return or a task."""
        if self._log:
            for name, value in values.items():  # JSON knows no NaN
                if isinstance(value, float) and not math.isfinite(value):
                    values[name] = None
            self._tell(self._log.append({"kind": kind, "step": step, **values}))

    def _tell(self, error: OSError | None) -> None:
        """Say once that the disk takes no lines, and once that it does again."""
        if error and not self._waiting:
            self.console.say(f"metrics.jsonl cannot be written ({error.strerror}): lines wait")
        elif self._waiting and not error:
            self.console.say("metrics.jsonl is written again, with every line that waited")
        self._waiting = error is not None

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop what was logged of steps that are taken again."""
        if self._log:
            self._log.rewind(keep)

    def close(self) -> None:
        if self._log and (error := self._log.close()):
            self.console.say(f"the last lines of metrics.jsonl are lost ({error.strerror})")
