"""A checkpoint of GPT-2 124M with AdamW's moments against a plain write of the same bytes.

    python -m benchmarks.checkpoint [--out benchmarks/results/checkpoint.json]

All in one process and in turn, round by round: (a) the same bytes written and flushed, nothing
else; (b) a checkpoint while the loop waits for it, hashes and all; (c) a checkpoint while the loop
trains on. The stall is how long the loop stands still when it begins a checkpoint.
"""

import argparse
import math
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import environment, quantiles, write_result
from rekindle import storage
from rekindle.model.gpt2 import GPT2
from rekindle.observe.console import Console
from rekindle.observe.metrics import Metrics
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import get_recipe
from rekindle.runtime.checkpoint import Keep, Snapshot
from rekindle.runtime.device import get_device
from rekindle.runtime.distributed import World
from rekindle.runtime.saving import Saver
from rekindle.train import train_step

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
ROWS, T = 1, 64  # of the training step: a small one, so that a stall would show


class Training:
    """GPT-2 124M on the CPU, and what it takes to step and to save."""

    def __init__(self, folder: Path) -> None:
        self.device = get_device("cpu")
        self.model = GPT2(get_recipe("gpt2-124m").model.for_training())
        self.optimizer = AdamW(self.model, AdamWConfig(lr=6e-4))
        self.tokens = torch.randint(0, self.model.config.vocab_size, (1, ROWS, T))
        self.checkpoints, self.log = folder / "checkpoints", folder / "metrics.jsonl"
        metrics = Metrics(
            storage.JsonLines(self.log), Console(quiet=True), steps=1, tokens_per_step=ROWS * T,
            flops_per_token=1, peak_flops=None,
        )  # fmt: skip
        self.saver = Saver(self.checkpoints, Keep(), self.model, self.optimizer, metrics, World())

    def step(self) -> float:
        began = time.perf_counter()
        train_step(
            self.model, list(self.model.parameters()), self.optimizer, self.tokens, self.tokens,
            lr=1e-5, clip=1.0, limit=math.inf, device=self.device, world=World(),
        )  # fmt: skip
        return time.perf_counter() - began

    def save(self, step: int, *, train_on: bool) -> dict[str, Any]:
        """Seconds that a checkpoint took, that the loop stood still, and of the steps meanwhile."""
        threads, began = threading.active_count(), time.perf_counter()
        self.saver.save({"step": step})
        stall = time.perf_counter() - began
        path, steps = self.checkpoints / f"step-{step:06d}", []
        while train_on and threading.active_count() > threads:
            steps.append(self.step())
        self.saver.finish()
        record = storage.read_json_lines(self.log)[-1]
        assert (record["kind"], record["step"]) == ("checkpoint", step)
        shutil.rmtree(path)
        return {"seconds": record["seconds"], "stall_s": stall, "steps": steps}


def plain_write(file: Path, arrays: list[np.ndarray]) -> float:
    """Seconds to write these bytes and flush them to the disk."""
    began = time.perf_counter()
    with open(file, "wb") as handle:
        for array in arrays:
            handle.write(array.data)
        handle.flush()
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - began
    file.unlink()
    return seconds


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    training = Training(folder)
    training.step()  # makes AdamW's moments
    snapshot = Snapshot(training.model, training.optimizer)
    snapshot.take(training.model, training.optimizer)
    arrays = [t.numpy() for t in (*snapshot.model.values(), *snapshot.optimizer.values())]
    size = sum(array.nbytes for array in arrays)
    plain, alone, beside, undisturbed = [], [], [], []
    for i in range(-1, rounds):
        os.sync()  # what the round before has removed is not written in this one
        row = (
            plain_write(folder / "plain", arrays),
            training.save(2 * i + 2, train_on=False),
            training.step(),
            training.save(2 * i + 3, train_on=True),
        )
        print(
            f"round {i + 1}: plain {row[0]:.2f} s, checkpoint {row[1]['seconds']:.2f} s "
            f"(stall {row[1]['stall_s']:.2f} s), while it trains {row[3]['seconds']:.2f} s; "
            f"a step {row[2]:.2f} s" + (" (warm-up, not counted)" if i < 0 else ""),
            flush=True,
        )
        if i >= 0:  # the first finds no memory in the page cache
            for column, value in zip((plain, alone, undisturbed, beside), row, strict=True):
                column.append(value)
    ratios = [b["seconds"] / a for a, b in zip(plain, alone, strict=True)]
    return {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "bytes": size,
        "rounds": rounds,
        "plain_write": {"seconds": quantiles(plain)},
        "checkpoint": {
            "seconds": quantiles([row["seconds"] for row in alone]),
            "times_plain_write": quantiles(ratios),  # round by round
        },
        "checkpoint_beside_training": {
            "seconds": quantiles([row["seconds"] for row in beside]),
            "step_seconds": quantiles([s for row in beside for s in row["steps"]]),
        },
        "stall_s": quantiles([row["stall_s"] for row in (*alone, *beside)]),
        "step": {"rows": ROWS, "T": T, "seconds": quantiles(undisturbed)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="a checkpoint in the background")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the figures go (JSON)")
    parser.add_argument("--rounds", type=int, default=7, help="beside one to warm up; at least 2")
    parser.add_argument("--disk", type=Path, metavar="DIR", help="where to write, if not in TMPDIR")
    arguments = parser.parse_args()
    machine = environment("torch", "numpy", "safetensors")
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        figures = measure(Path(folder), max(2, arguments.rounds))
    write_result(arguments.out, {**machine, **figures})
    print(
        f"{figures['checkpoint']['times_plain_write']['median']:.2f} x a plain write, the loop "
        f"stands still for {figures['stall_s']['median']:.2f} s, written to {arguments.out}"
    )


if __name__ == "__main__":
    main()
