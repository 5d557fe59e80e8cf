"""Runs `rekindle train` in its own process and detects its first step."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rekindle.evaluate.tasks import TASKS

WAIT = 120.0  # seconds that a run may take to save and exit after a stop signal


def train_command(recipe: str, data: Path, run: Path, device: str, *flags: object) -> list[str]:
    """The README's command. Tasks that the flags give no file for are disabled, since they would
    need a network."""
    without = [word for name in TASKS if f"--{name}" not in flags for word in (f"--{name}", "none")]
    command = [sys.executable, "-m", "rekindle", "train", recipe, "--data", data, "--out", run]
    if device != "cuda":  # a GPU is detected automatically
        command += ["--device", device]
    return [str(word) for word in [*command, *without, *flags]]


class Running:
    """A context for a process, which is killed on exit if it is still running."""

    def __init__(self, command: Sequence[str]) -> None:
        self._began = time.monotonic()
        self._stepped = threading.Event()
        self.first_step_s: float | None = (
            None  # seconds from the start to the end of the first step
        )
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            print(line, end="", flush=True)
            if "first step done" in line and self.first_step_s is None:
                self.first_step_s = time.monotonic() - self._began
                self._stepped.set()
        self._stepped.set()  # the process has ended

    def wait_for_first_step(self) -> None:
        """Raises `SystemExit` if the run ends before its first step."""
        self._stepped.wait()
        if self.first_step_s is None:
            raise SystemExit(f"the run ended before its first step, status {self.process.wait()}")

    def let_run(self, seconds: float) -> None:
        """Wait for `seconds`. Raises `SystemExit` if the run ends earlier."""
        try:
            status = self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return
        raise SystemExit(f"the run ended early, with status {status}")

    def stop(self) -> None:
        """Send SIGTERM, and wait until the run has saved and exited."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT)
