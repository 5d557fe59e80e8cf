"""The output of a running command: permanent lines, and a progress line."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO


def duration(seconds: float) -> str:
    """Seconds for a person to read: 58 ms, 4.2 s, 42 s, 3 min 20 s, 5 h 07 min."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1e3:.0f} ms"
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


def counted(number: int, noun: str) -> str:
    """1 rank, 2 ranks, 1,024 ranks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class Console:
    """Prints on the main process only. On a terminal the progress line is rewritten in place;
    elsewhere a plain line is printed every ten seconds. Safe to call from several threads."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._quiet = quiet
        self.live = self._stream.isatty()
        self._pending = ""  # what ends the progress line on the screen, if there is one
        self._next = 0.0  # when the next progress line is due
        self._lock = threading.Lock()

    def print(self, text: str) -> None:
        """Print a permanent line."""
        if self._quiet:
            return
        with self._lock:
            self._end_line()
            self._write(text + "\n")

    def progress(self, *parts: str, important: bool = False, passing: bool = False) -> None:
        """Show a progress line, with its parts joined by " | ". An `important` line is always shown
        and is permanent. On a terminal, parts that do not fit the width are dropped, and a
        `passing` line is overwritten by the next printed line."""
        if self._quiet or (time.monotonic() < self._next and not important):
            return
        self.postpone()
        with self._lock:
            if not self.live:
                self._write(" | ".join(parts) + "\n")
                return
            self._write(f"\r\033[K{fitting(parts, shutil.get_terminal_size().columns - 1)}")
            self._pending = "\r\033[K" if passing else "\n"
            if important:
                self._end_line()

    def postpone(self) -> None:
        """Show the next progress line only after the usual interval."""
        self._next = time.monotonic() + (0.2 if self.live else 10.0)

    def _end_line(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = ""

    def _write(self, text: str) -> None:
        """A closed pipe or a full disk behind stdout must not end a training run."""
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError:
            self._quiet = True
            # Else flushing the buffer at exit fails again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def fitting(parts: Sequence[str], width: int) -> str:
    """The first parts that fit into `width`, since a wrapped line cannot be overwritten."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 3 + len(part) > width:
            break
        text += f" | {part}"
    return text[:width]
