"""The processes of `tests.mutate`: pytest on a copy of the repository, with a plugin that selects
and reports tests, or one that records the functions that each test executes."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Tests that are not run, because they are slow or start many processes.
LEFT_OUT = ("distributed/", "parity/", "kernels", "kills", "killed", "compile", "fuzz",
            "embedded_text", "cost", "benchmark", "ladder", "launch", "memory_does_not",
            "whole_road")  # fmt: skip

# Test → {"seconds": processor time, "functions": ["file:qualified.name", ...]}
Seen = dict[str, dict[str, Any]]

# Installed as `sitecustomize` in every process that tests start. Appends the name of each executed
# function once to the file in REKINDLE_TRACE.
TRACER = """
import os, sys, threading
PACKAGE = {package!r}
def trace(frame, event, argument, seen={{}}):
    path = frame.f_code.co_filename
    if path.startswith(PACKAGE) and (where := os.environ.get("REKINDLE_TRACE")):
        name = path[len(PACKAGE) - 9:] + ":" + frame.f_code.co_qualname
        if seen.setdefault(name, "") != where:
            seen[name] = where
            with open(where, "a") as file:
                file.write(name + chr(10))
if "REKINDLE_TRACE" in os.environ:
    threading.settrace(trace)
    sys.settrace(trace)
"""


class Chosen:
    """pytest plugin: runs these tests in this order, and reports each of them on `pipe`."""

    def __init__(self, tests: list[str] | None, pipe: int) -> None:
        self.tests, self.pipe = tests, pipe

    def report(self, kind: str, text: str) -> None:
        os.write(self.pipe, f"{kind} {text}\n".encode())

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.tests is None:
            items[:] = [i for i in items if not any(word in i.nodeid for word in LEFT_OUT)]
            return
        order = {name: number for number, name in enumerate(self.tests)}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.report("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.report("failed", report.nodeid)


class Mapper(Chosen):
    """Also records the functions that each test and its child processes execute."""

    def __init__(self, pipe: int, folder: Path) -> None:
        super().__init__(None, pipe)
        self.folder, self.seen = folder, Seen()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        trace = self.folder / f"trace-{len(self.seen)}"  # a new file for each test: see TRACER
        trace.write_text("")
        os.environ["REKINDLE_TRACE"] = str(trace)
        began = sum(os.times()[:4])
        try:
            return (yield)
        finally:
            seconds = sum(os.times()[:4]) - began
            names = trace.read_text().splitlines()
            functions = sorted({name.split(".<locals>.<")[0] for name in names})
            self.seen[item.nodeid] = {"seconds": seconds, "functions": functions}


def make_copy(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def pytest_in(folder: Path, files: Iterable[str], plugin: Chosen, *flags: str) -> int:
    """Run tests in this process, which should exit afterwards. The package is imported from the
    copy in `folder`, here and in child processes."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(folder)
    for name in [n for n in sys.modules if n.split(".")[0] in ("rekindle", "tests", "benchmarks")]:
        del sys.modules[name]
    base = f"--basetemp={folder.with_name(folder.name + '-tmp')}"
    fixed = ["-q", "-p", "no:cacheprovider", "-m", "not slow", base]
    return int(pytest.main([*fixed, *flags, *files], plugins=[plugin]))


def forked(work: Callable[[int], int], log: Path) -> tuple[int, int]:
    """Run `work(pipe)` in a process with its own group; return its id and the pipe to read from."""
    reads, writes = os.pipe()
    if pid := os.fork():
        os.close(writes)
        return pid, reads
    status = 70
    try:
        os.setsid()
        os.close(reads)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = work(writes)
    finally:
        os._exit(status)


def end(pid: int) -> None:
    """Kill a process group: the process and everything that its tests have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
