"""Trains for a minute, and compares the losses of the first steps with those of a CPU in float32.

`benchmarks.pack` computes the CPU's losses, so that a rented machine does not spend time on them.
"""

import argparse
import dataclasses
import gc
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import PACKED, quantiles
from benchmarks.running import Running, train_command
from benchmarks.ways import KERNELS, LECTURE, LOSS_KERNEL
from rekindle import checkpoint, storage
from rekindle.data import shards
from rekindle.ladder import Levers, Work
from rekindle.ladder.measure import make_trainer

# Largest difference in nats between a loss in bf16 and in float32 after a few steps.
ALLOWED = 0.02
EVAL_TOKENS = 524_288


def trajectory(recipe: str, data: Path, device: str, rows: int, steps: int, levers: Levers) -> Any:
    """The losses of the first `steps` steps of `rows` windows each, at a constant learning rate."""
    work = Work(recipe, str(data), device, rows, steps, warmup=0)
    with make_trainer(work, dataclasses.replace(levers, micro=rows, compile=False)) as trainer:
        return [trainer.train_step().loss for _ in range(steps)]


def reference(recipe: str, data: Path, rows: int, steps: int) -> dict[str, Any]:
    """The losses of a CPU in float32, and the fingerprint of the data."""
    fp32 = dataclasses.replace(LECTURE, precision="fp32")
    return {
        "recipe": recipe,
        "rows": rows,
        "steps": steps,
        "fingerprint": shards.read_manifest(data).fingerprint,
        "losses": trajectory(recipe, data, "cpu", rows, steps, fp32),
    }


def train(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """First compare losses, which takes seconds; then train for a minute."""
    found = {"against_cpu": _against_cpu(o)}
    print(found, flush=True)
    save(found)
    gc.collect()  # the next process measures how much memory is free
    if o.device == "cuda":
        torch.cuda.empty_cache()
    save({**found, "minute": _minute(o)})


def _against_cpu(o: argparse.Namespace) -> dict[str, Any]:
    """The largest difference between the losses of a step, for each way to compute."""
    if not PACKED.exists():
        return {"why_not": "no losses of a CPU: only a folder from benchmarks.pack has them"}
    cpu = json.loads(PACKED.read_text())["reference"]
    if cpu["fingerprint"] != shards.read_manifest(o.data).fingerprint:
        return {"why_not": "the losses of the CPU were computed from other data"}
    ways = {"autocast": LECTURE}
    if o.device == "cuda":
        ways |= {"bf16 + loss kernel": LOSS_KERNEL, "bf16 + kernels": KERNELS}
    found: dict[str, Any] = {"cpu": [round(loss, 5) for loss in cpu["losses"]]}
    for name, levers in ways.items():
        losses = trajectory(cpu["recipe"], o.data, o.device, cpu["rows"], cpu["steps"], levers)
        apart = max(abs(a - b) for a, b in zip(losses, cpu["losses"], strict=True))
        apart = apart if all(map(math.isfinite, losses)) else math.inf
        found[name] = {
            "losses": [round(loss, 5) for loss in losses],
            "largest_difference_nats": round(apart, 5),
            "passed": apart <= ALLOWED,
        }
    return found


def _minute(o: argparse.Namespace) -> dict[str, Any]:
    """Train with the command line for `o.seconds` after the first step; then stop the run."""
    folder = Path(tempfile.mkdtemp())
    run = folder / "run"
    flags = ["--no-compile"] if o.no_compile else []
    command = train_command(o.recipe, o.data, run, o.device, "--eval-tokens", EVAL_TOKENS, *flags)
    try:
        with Running(command) as running:
            running.wait_for_first_step()
            running.let_run(o.seconds)
            running.stop()
        records = storage.read_json_lines(run / "metrics.jsonl")
        steps = [r for r in records if r["kind"] == "train"]
        seconds = [r["seconds"] for r in steps[1:]]
        saved = checkpoint.list_checkpoints(run / "checkpoints")
        return {
            "first_step_s": round(running.first_step_s or 0, 1),
            "steps": len(steps),
            "step_seconds": quantiles(seconds) if len(seconds) > 1 else None,
            "losses": [r["loss"] for r in steps],
            "grad_norms": [r["grad_norm"] for r in steps],
            "validation": [r["loss"] for r in records if r["kind"] == "validation"],
            "checkpoint": saved[-1].name if saved else None,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
