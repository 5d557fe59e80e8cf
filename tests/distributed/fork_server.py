"""Runs torchrun in forked processes, whose ranks are forked too, so that torch is loaded only once.

Reads jobs from stdin and prints results to stdout, one JSON object per line:
{"hosts": [{"torchrun": [...], "rank": [arguments of rank.work], "network": ""}], "limit": 120}
[{"status": 0, "out": "...", "err": "", "seconds": 1.2}]
Only the start of a rank (`Popen` below) replaces torchrun's own code.
"""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.distributed.rank import work


class Popen:
    """Replaces `subprocess.Popen([python, "-u", SCRIPT, *arguments], ...)` in torchrun."""

    patience = 30.0  # seconds between SIGTERM and SIGKILL; torchrun's default

    def __init__(self, args: tuple[str, ...], env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None

        def begin() -> int:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not torchrun's handlers
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(env)
            torch.set_num_threads(1)  # recreate torch's thread pool before several threads try to
            return work(*args[3:])

        self.pid = fork(begin)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        end = time.monotonic() + (min(timeout, self.patience) if timeout < math.inf else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.02)
        return status


def fork(begin: Callable[[], int]) -> int:
    """Fork a process with its own group that exits with the status of `begin`; return its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        status = begin()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Host:
    """One torchrun with its ranks."""

    def __init__(
        self, torchrun: list[str], rank: list[str], network: str = "", patience: float = 30
    ) -> None:
        self._arguments = [*torchrun, "rank.py", *rank]
        self._network, self._patience = network, patience
        self._printed = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._began = time.monotonic()
        self.pid = fork(self._begin)

    def _begin(self) -> int:
        for number, file in enumerate(self._printed, 1):
            os.dup2(file.fileno(), number)
        if self._network:  # join the network namespace of that name
            with open(f"/run/netns/{self._network}") as file:
                assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0
            os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        Popen.patience = self._patience
        torchrun.main(self._arguments)
        return 0

    def wait(self, limit: float) -> dict[str, Any]:
        end = self._began + limit
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGTERM)  # ends its ranks too
                end += 60
            time.sleep(0.02)
        out, err = (file.seek(0) or file.read() for file in self._printed)
        return {
            "status": os.waitstatus_to_exitcode(ended[1]), "out": out, "err": err,
            "seconds": time.monotonic() - self._began,
        }  # fmt: skip


def serve() -> None:
    subprocess_handler.Popen = Popen  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # loads the compiler
    results = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        hosts = [Host(**host) for host in job["hosts"]]
        print(json.dumps([host.wait(job["limit"]) for host in hosts]), file=results, flush=True)


if __name__ == "__main__":
    serve()
