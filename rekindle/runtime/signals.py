"""Stop signals: the first one requests a stop after the current step, the second one ends the
process at once."""

import os
import signal
import socket
import threading
import time

# Sent by Ctrl-C; by `kill` or a scheduler; by Slurm as an advance warning; by a closed terminal.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# After Ctrl-C, torchrun forwards a signal that its processes have already received from the
# terminal: a second signal within this many seconds is ignored.
ECHO = 1.0


class Listener:
    """A context manager that records stop signals. It has an effect only in the main thread.

    A separate thread receives the signals, because Python runs signal handlers only in the main
    thread, which may be blocked in C++, waiting for a GPU or for a rank that hangs.
    """

    def __init__(self) -> None:
        self.signal = 0  # number of the first signal received; 0: none
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Listener":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)  # required by set_wakeup_fd
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup, for example
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        """Each signal arrives as one byte, its number; an empty read means that the socket was
        closed."""
        while received := self._reader.recv(1):
            if received[0] in self._before:
                self._receive(received[0])

    def _receive(self, number: int) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            os._exit(128 + number)  # safe: unfinished files still have temporary names
