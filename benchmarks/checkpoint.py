"""Time a checkpoint of GPT-2 124M with AdamW's state, and a plain write of the same bytes.

    python -m benchmarks.checkpoint [--out benchmarks/results/checkpoint.json]

Each round, in one process: (a) a plain write and flush of the same bytes; (b) a checkpoint, with
hashes, while the loop waits for it; (c) a checkpoint while training continues. The stall is the
time for which training pauses when a checkpoint starts.
"""

import argparse
import dataclasses
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, quantiles, write_result
from rekindle import storage
from rekindle.checkpoint import Keep, Saver, Snapshot
from rekindle.machine import MachineOptions, resolve
from rekindle.observe.console import Console
from rekindle.observe.json_lines import JsonLinesLogger
from rekindle.observe.metrics import Metrics
from rekindle.recipes import Batch, get_recipe
from rekindle.trainer import build

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
ROWS, T = 1, 64  # of a training step: small, so that a stall is visible


class Training:
    """GPT-2 124M training on the CPU, and the saver of its checkpoints."""

    def __init__(self, folder: Path) -> None:
        recipe = get_recipe("gpt2-124m")
        random = np.random.default_rng(0)
        tokens = random.integers(0, recipe.model.vocab_size, 64 * T, np.uint16)
        recipe = dataclasses.replace(
            recipe,
            model=recipe.model.for_training(),
            batch=Batch(tokens=ROWS * T, length=T),
            steps=10**6,
        )
        machine = resolve(MachineOptions(device="cpu", compile=False, micro_batch=ROWS))
        self.trainer = build(recipe, [tokens], machine)
        self.checkpoints, self.log = folder / "checkpoints", folder / "metrics.jsonl"
        metrics = Metrics(
            [JsonLinesLogger(storage.JsonLines(self.log), print)],
            Console(quiet=True),
            steps=1,
            tokens_per_step=ROWS * T,
            flops_per_token=1,
            peak_flops=None,
        )
        t = self.trainer
        self.saver = Saver(self.checkpoints, Keep(), t.model, t.optimizer, metrics, t.world)

    def step(self) -> float:
        began = time.perf_counter()
        self.trainer.train_step()
        return time.perf_counter() - began

    def save(self, *, train_on: bool) -> dict[str, Any]:
        """Seconds of the checkpoint, of the pause, and of each training step meanwhile."""
        threads, began = threading.active_count(), time.perf_counter()
        description = self.trainer.describe()
        self.saver.save(description)
        stall = time.perf_counter() - began
        path, steps = self.checkpoints / f"step-{description.step:06d}", []
        while train_on and threading.active_count() > threads:
            steps.append(self.step())
        self.saver.finish()
        record = storage.read_json_lines(self.log)[-1]
        assert (record["kind"], record["step"]) == ("checkpoint", description.step)
        shutil.rmtree(path)
        return {"seconds": record["seconds"], "stall_s": stall, "steps": steps}


def plain_write(file: Path, arrays: list[np.ndarray]) -> float:
    """Seconds to write these bytes and flush them to disk."""
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
    training.step()
    model, optimizer = training.trainer.model, training.trainer.optimizer
    snapshot = Snapshot(model, optimizer)
    snapshot.take(model, optimizer)
    arrays = [t.numpy() for t in (*snapshot.model.values(), *snapshot.optimizer.values())]
    size = sum(array.nbytes for array in arrays)
    plain, alone, during, idle_steps = [], [], [], []
    for i in range(-1, rounds):
        os.sync()  # so that this round does not write back data of the previous one
        row = (
            plain_write(folder / "plain", arrays),
            training.save(train_on=False),
            training.step(),
            training.save(train_on=True),
        )
        print(
            f"round {i + 1}: plain {row[0]:.2f} s, checkpoint {row[1]['seconds']:.2f} s "
            f"(stall {row[1]['stall_s']:.2f} s), while training {row[3]['seconds']:.2f} s; "
            f"step {row[2]:.2f} s" + (" (warm-up, not counted)" if i < 0 else ""),
            flush=True,
        )
        if i >= 0:  # the first one has to allocate the page cache
            for column, value in zip((plain, alone, idle_steps, during), row, strict=True):
                column.append(value)
    ratios = [b["seconds"] / a for a, b in zip(plain, alone, strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "rounds": rounds,
        "plain_write": {"seconds": quantiles(plain)},
        "checkpoint": {
            "seconds": quantiles([row["seconds"] for row in alone]),
            "times_plain_write": quantiles(ratios),  # round by round
        },
        "checkpoint_beside_training": {
            "seconds": quantiles([row["seconds"] for row in during]),
            "step_seconds": quantiles([s for row in during for s in row["steps"]]),
        },
        "stall_s": quantiles([row["stall_s"] for row in (*alone, *during)]),
        "step": {"rows": ROWS, "T": T, "seconds": quantiles(idle_steps)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="time a checkpoint in the background")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument(
        "--rounds", type=int, default=7, help="not counting one to warm up; at least 2"
    )
    parser.add_argument(
        "--disk", type=Path, metavar="DIR", help="folder to write to (default: TMPDIR)"
    )
    arguments = parser.parse_args()
    machine = environment("torch", "numpy", "safetensors")
    with tempfile.TemporaryDirectory(dir=arguments.disk) as folder:
        figures = measure(Path(folder), max(2, arguments.rounds))
    write_result(arguments.out, {**machine, **figures})
    print(
        f"{figures['checkpoint']['times_plain_write']['median']:.2f} x a plain write, training "
        f"pauses for {figures['stall_s']['median']:.2f} s, written to {arguments.out}"
    )


if __name__ == "__main__":
    main()
