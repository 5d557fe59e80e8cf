"""A nursery of processes to be killed, and a disk that fails when told."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


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
def nursery(fault_library: Path) -> Iterator[Callable[..., End]]:
    """`nursery(arguments, fault="write model 1 1 28")`, `nursery(arguments, signal=9, after=1)`:
    a command of rekindle in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, HERE / "nursery.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(fault_library),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    asked, answered = process.stdin, process.stdout
    assert asked
    assert answered
    assert answered.readline() == "ready\n"

    def run(arguments: list[str], **job: Any) -> End:
        print(json.dumps({"arguments": [str(a) for a in arguments], **job}), file=asked, flush=True)
        return End(**json.loads(answered.readline()))

    yield run
    asked.close()
    process.wait()
