"""Stop requests: the first signal is remembered until the step is done, the next one ends the
process at once."""

import os
import signal
import socket
import threading
import time

# What Ctrl-C sends, what `kill` or a scheduler sends, and what Slurm can send as a warning.
SIGNALS = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s)]
ECHO = 1.0  # seconds: after Ctrl-C torchrun passes on what its processes have had already


class Listener:
    """Listens for signals while it is entered, in the main thread of the process.

    A thread of its own hears them: Python runs a handler in the main thread only, and that may be
    waiting in C++ for a GPU or for a rank that never comes.
    """

    def __init__(self) -> None:
        self.signal = 0  # the first signal's number
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Listener":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)  # as Python asks for
        self._woken = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in a script
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._woken)
        self._mouth.close()
        self._thread.join()
        self._ear.close()

    def _listen(self) -> None:
        """Each signal is a byte, its number; the end is an empty read."""
        while heard := self._ear.recv(1):
            if heard[0] in self._before:
                self._hear(heard[0])

    def _hear(self, number: int) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            os._exit(128 + number)  # what is half-written has a temporary name
