"""The cost of reading, permuting and converting a batch of 524,288 tokens, the lecture's step.

    python -m benchmarks.batches [--data DIR] [--out benchmarks/results/batches.json]

It is compared with the time of such a step at 700,000 tokens/s. In training, batches are read by a
thread while the previous step runs; here they are timed alone.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, quantiles, write_result
from rekindle.data import shards, sources
from rekindle.data.batches import Batches, Partition, Windows
from rekindle.data.prepare import prepare

RESULT = Path(__file__).parent / "results" / "batches.json"
TOKENS, T, MICRO = 524_288, 1024, 64
FAST = 700_000  # tokens/s of the step to compare with


def measure(data: Path, steps: int) -> dict[str, Any]:
    windows = Windows(shards.open_split(data, shards.read_manifest(data), "train"), T)
    rows = min(TOKENS // T, len(windows))
    split = Partition.of(rows, next(m for m in range(MICRO, 0, -1) if rows % m == 0))
    figures: dict[str, Any] = {}
    for order in ("shuffled", "sequential"):
        batches, seconds = Batches(windows, rows, 1337, order), []
        for step in range(steps):
            began = time.perf_counter()
            x, y = (np.ascontiguousarray(a) for a in batches.batch(step, split))
            assert x.size == y.size == rows * T
            seconds.append((time.perf_counter() - began) * TOKENS / x.size)  # scaled to a full step
        ms = quantiles([1e3 * s for s in seconds])
        share = ms["median"] / (1e3 * TOKENS / FAST)
        figures[order] = {"ms_per_step": ms, "share_of_step": round(share, 4)}
        print(f"{order}: {ms['median']:.2f} ms, {share:.2%} of a step at {FAST:,} tokens/s")
    return {"tokens_per_step": TOKENS, "step_tokens_per_s": FAST, "orders": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description="time the reading of batches")
    parser.add_argument(
        "--data", type=Path, help="folder of shards (default: Python's documentation)"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=100)
    o = parser.parse_args()
    machine = environment("numpy")
    with tempfile.TemporaryDirectory() as folder:
        if not o.data:
            prepare(sources.from_arguments(embedded=True), Path(folder), val_tokens=0)
        figures = measure(o.data or Path(folder), max(2, o.steps))
    write_result(o.out, {**machine, **figures})


if __name__ == "__main__":
    main()
