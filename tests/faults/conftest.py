"""Processes that can be killed, and a disk that fails on request."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


MEMORY = Path(
    "/dev/shm"
)  # flushing takes no time, and killing a process loses the same data as on disk


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A new folder, in memory if there is a file system with enough room."""
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < 2**25:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class End(NamedTuple):
    """How a command ended: its exit status, or minus the signal that killed it."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs gcc and LD_PRELOAD")
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "fault.c", "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def fork_server(fault_library: Path) -> Iterator[Callable[..., End]]:
    """`fork_server(arguments, fault="write model 1 1 28")` or `fork_server(arguments, signal=9,
    after=1)`: run a command of rekindle in a separate process."""
    process = subprocess.Popen(
        [sys.executable, HERE / "fork_server.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(fault_library),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    requests, results = process.stdin, process.stdout
    assert requests
    assert results
    assert results.readline() == "ready\n"

    def run(arguments: list[str], **job: Any) -> End:
        print(
            json.dumps({"arguments": [str(a) for a in arguments], **job}), file=requests, flush=True
        )
        return End(**json.loads(results.readline()))

    yield run
    requests.close()
    process.wait()


# -- the state of the disk before every operation --------------------------------------------------

Disk = dict[str, bytes | None]  # by path under the folder: a file's content; None for a folder


def read_disk(folder: Path) -> Disk:
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in found}


def write_disk(folder: Path, disk: Disk) -> Path:
    folder.mkdir(parents=True)
    for name, content in disk.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    return folder


@dataclass
class Trace:
    """What one command did to a folder, and what the folder held before each operation.

    `killed` is the state that a kill at that moment leaves; `without_power` is what a power cut may
    leave: the same names, but only the flushed content of each file. Equal states are kept once,
    under the first operation that they precede.
    """

    folder: Path
    flushed: Disk
    operations: list[tuple[str, str, str]] = field(default_factory=list)  # call, path, second path
    killed: dict[str, Disk] = field(default_factory=dict)
    without_power: dict[str, Disk] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _done: tuple[str, str, str] = ("", "", "")

    def before(self, call: str, *paths: str) -> None:
        """Record the state of the disk before `call` is executed."""
        disk = read_disk(self.folder) if self.folder.exists() else {}
        self._follow(*self._done, disk)
        here, there = (os.path.relpath(path, self.folder) if path else "" for path in paths)
        self._done = call, here, there
        self.operations.append(self._done)
        name = f"{len(self.operations)}: {call} {here} {there}".rstrip()
        kept = {p: c if c is None else self.flushed.get(p) or b"" for p, c in disk.items()}
        for states, state in ((self.killed, disk), (self.without_power, kept)):
            if (number := hash(tuple(state.items()))) not in self._seen:
                self._seen.add(number)
                states[name] = state

    def _follow(self, call: str, path: str, other: str, disk: Disk) -> None:
        """Update the flushed content after an operation."""
        if call == "fsync" and disk.get(path) is not None:
            self.flushed[path] = disk[path]
        elif call in ("truncate", "unlink"):
            self.flushed.pop(path, None)
        elif call == "rename":
            for name in [n for n in self.flushed if n == path or n.startswith(f"{path}/")]:
                self.flushed[other + name.removeprefix(path)] = self.flushed.pop(name)


@pytest.fixture(scope="session")
def traced(fork_server: Callable[..., End]) -> Callable[..., Trace]:
    """`traced(folder, arguments)`: run the command, which must succeed, and trace it."""

    def run(folder: Path, arguments: list[str]) -> Trace:
        trace = Trace(folder, read_disk(folder) if folder.exists() else {})
        pipes = [Path(f"{folder}.{name}") for name in ("requests", "replies")]
        for pipe in pipes:
            os.mkfifo(pipe)
        requests, replies = (os.open(pipe, os.O_RDWR) for pipe in pipes)

        def serve() -> None:
            while (line := os.read(requests, 10_000).decode().rstrip("\n")) != "end":
                trace.before(*line.split("\t"))
                os.write(replies, b".")

        server = threading.Thread(target=serve)
        server.start()
        end = fork_server(arguments, trace=str(folder))
        os.write(requests, b"end\n")
        server.join()
        for descriptor, pipe in zip((requests, replies), pipes, strict=True):
            os.close(descriptor)
            pipe.unlink()
        assert end.status == 0, end.err
        trace.before("end", str(folder), "")
        return trace

    return run


@pytest.fixture(name="write_disk")
def _write_disk() -> Callable[[Path, Disk], Path]:
    """`write_disk(folder, disk)`: create the folder with this content."""
    return write_disk
