"""A `rekindle train` in a process of its own, watched until its first step and beyond."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rekindle.evaluate.tasks import TASKS

WAIT = 120.0  # seconds that a signalled run may take to save and end


def train_command(recipe: str, data: Path, run: Path, device: str, *flags: object) -> list[str]:
    """The README's command. Without a network no evaluation beyond the validation loss, unless the
    flags name its file."""
    without = [word for name in TASKS if f"--{name}" not in flags for word in (f"--{name}", "none")]
    command = [sys.executable, "-m", "rekindle", "train", recipe, "--data", data, "--out", run]
    if device != "cuda":  # which is found by itself
        command += ["--device", device]
    return [str(word) for word in [*command, *without, *flags]]


class Running:
    """The process. Use it as a context: it is killed at the end, if it still runs."""

    def __init__(self, command: Sequence[str]) -> None:
        self._began = time.monotonic()
        self._stepped = threading.Event()
        self.first_step_s: float | None = None  # seconds until the first step was done
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._listener.join()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            print(line, end="", flush=True)
            if "first step done" in line and self.first_step_s is None:
                self.first_step_s = time.monotonic() - self._began
                self._stepped.set()
        self._stepped.set()  # it has ended

    def wait_for_first_step(self) -> None:
        """Raises `SystemExit` if the run ends before."""
        self._stepped.wait()
        if self.first_step_s is None:
            raise SystemExit(f"the run ended before its first step, status {self.process.wait()}")

    def let_run(self, seconds: float) -> None:
        """Raises `SystemExit` if the run ends by itself within so many seconds."""
        try:
            status = self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return
        raise SystemExit(f"the run ended by itself, with status {status}")

    def stop(self) -> None:
        """Ask the run to save and end, and wait until it has."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(WAIT)
