"""Being told to stop: the first signal is remembered until the step is done, the next one ends the
process at once."""

import os
import signal
import threading
import time
from types import FrameType

# What Ctrl-C sends, what `kill` or a scheduler sends, and what Slurm can send as a warning.
SIGNALS = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s)]
ECHO = 1.0  # seconds: after Ctrl-C torchrun passes on what its processes have had already


class Listener:
    """Listens for signals while it is entered, in the main thread of the process."""

    def __init__(self) -> None:
        self.told = 0  # the first signal's number
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Listener":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in a script
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.told:
            self.told, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            os._exit(128 + number)  # what is half-written has a temporary name
