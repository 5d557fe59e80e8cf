"""Time to start: the import, --help, and the first step of a new and of a resumed run.

    python -m benchmarks.startup [--out benchmarks/results/startup.json]

Complete commands in fresh processes that share Python's bytecode cache. The run is `gpt2-10m` on
Python's documentation: it starts with an empty cache of compiled graphs, and is then resumed.
`import torch` alone is timed for comparison.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, quantiles, write_result

RESULT = Path(__file__).parent / "results" / "startup.json"
COMMANDS = {
    "import rekindle": ["-c", "import rekindle"],
    "rekindle --help": ["-m", "rekindle", "--help"],
    "import torch": ["-c", "import torch"],
}


def timed(arguments: list[str], until: str = "", **environ: str) -> float:
    """Seconds until the command ends, or until it prints a line that contains `until`."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, bufsize=1,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "", **environ},
    )  # fmt: skip
    assert process.stdout
    seconds = None
    for line in process.stdout:
        if until and until in line and seconds is None:
            seconds = time.perf_counter() - began
    if process.wait() or (until and seconds is None):
        raise SystemExit(f"{' '.join(arguments)} failed or never printed {until!r}")
    return seconds or time.perf_counter() - began


def measure(rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, arguments in COMMANDS.items():
        figures[name] = {"seconds": quantiles([timed(arguments) for _ in range(rounds)])}
        print(f"{name}: {figures[name]['seconds']['median']:.2f} s", flush=True)
    first, resumed = [], []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            data, run, cache = f"{folder}/data", f"{folder}/run", f"{folder}/cache"
            timed(
                ["-m", "rekindle", "prepare", "--embedded", "--out", data, "--val-tokens", "20000"]
            )
            train = ["-m", "rekindle", "train", "gpt2-10m", "--data", data, "--out", run]
            train += ["--eval-tokens", "8192", "--prompt", "", "--device", "cpu", "--steps"]
            for steps, seconds in (("2", first), ("4", resumed)):
                environ = {"TORCHINDUCTOR_CACHE_DIR": cache}
                seconds.append(timed([*train, steps], "first step done", **environ))
            print(f"first step: {first[-1]:.1f} s, resumed {resumed[-1]:.1f} s", flush=True)
    figures["first step, empty cache"] = {"seconds": quantiles(first)}
    figures["first step of a resumed run, warm cache"] = {"seconds": quantiles(resumed)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="time to start")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=7)
    o = parser.parse_args()
    machine = environment("torch")
    figures = measure(max(2, o.rounds))
    write_result(o.out, {**machine, "figures": figures})


if __name__ == "__main__":
    main()
