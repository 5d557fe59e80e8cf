"""What a person reads while something runs: lines that stay, and one that shows progress."""

import os
import shutil
import sys
import threading
import time
from typing import TextIO


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
        self._pending = ""  # ends the progress line that is on the screen, if one is
        self._next = 0.0  # when the next progress line is due
        self._lock = threading.Lock()

    def print(self, text: str) -> None:
        """Print a line that stays."""
        if self._quiet:
            return
        with self._lock:
            self._end_line()
            self._write(text + "\n")

    def progress(self, text: str, *, important: bool = False, passing: bool = False) -> None:
        """Show where things stand; `important` lines are shown in any case, and stay. On a terminal
        the next line that is said takes the place of a `passing` one."""
        if self._quiet or (time.monotonic() < self._next and not important):
            return
        self.postpone()
        with self._lock:
            if not self._live:
                self._write(text + "\n")
                return
            text = text[: shutil.get_terminal_size().columns - 1]  # wrapped, it would stay
            self._write(f"\r\033[K{text}")
            self._pending = "\r\033[K" if passing else "\n"
            if important:
                self._end_line()

    def postpone(self) -> None:
        """Show the next progress line only when the usual time has passed."""
        self._next = time.monotonic() + (0.2 if self._live else 10.0)

    def _end_line(self) -> None:
        if self._pending:
            self._write(self._pending)
            self._pending = ""

    def _write(self, text: str) -> None:
        """Nobody who reads, or no room where it goes: that is no reason for a training to end."""
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError:
            self._quiet = True
            # What is left in its buffer would fail once more when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
