"""A long run does not use more memory than a short one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STEPS, SETTLED = 2400, 400  # everything has happened more than once by step SETTLED

# Trains in this process and prints its resident pages at step SETTLED and at the end.
WATCHED = """
import gc, sys
from rekindle import cli, trainer

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

at, original, seen = int(sys.argv[1]), trainer.learning_rate, []

def watched(step, **options):
    if step == at or step == options["steps"] - 1:
        seen.append(resident())
    return original(step, **options)

trainer.learning_rate = watched
assert cli.main(sys.argv[2:]) == 0
print(*seen)
"""


@pytest.mark.slow  # a leak grows slowly: only thousands of steps show it
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow(tmp_path: Path, command: Callable) -> None:
    flags = ["--steps", STEPS, "--eval-every", 50, "--checkpoint-every", 50]
    flags += ["--keep-checkpoints", 2]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, [SETTLED, *command(tmp_path / "run"), *flags])],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settled, end = map(int, done.stdout.splitlines()[-1].split())
    print(f"{settled} pages at step {SETTLED}, {end} at step {STEPS}")
    assert end < 1.01 * settled
