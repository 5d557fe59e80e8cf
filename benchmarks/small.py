"""A small model on a CPU: compare the step of `rekindle train` with a plain eager loop.

    python -m benchmarks.small [--out benchmarks/results/small.json]

All arms train the same model on the same tokens (Python's documentation, as bytes), each in its own
process, in turn; repeats show the noise. The plain loop is what a tutorial would write: float32,
fused attention, AdamW and clipping parameter by parameter, not compiled.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, quantiles, write_result
from rekindle.data import shards, sources
from rekindle.data.prepare import prepare
from rekindle.machine import MachineOptions, resolve
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Batch, Recipe, Schedule
from rekindle.trainer import Trainer, build

RESULT = Path(__file__).parent / "results" / "small.json"
# rows, T, warm-up steps, timed steps; the model has 4 layers, 128 wide, 4 heads
SHAPES = {"tutorial": (12, 64, 50, 200), "demo": (32, 128, 15, 50)}
ARMS = {  # precision, compiled; None: the plain loop
    "plain eager loop": None,
    "rekindle": ("auto", True),
    "rekindle, fp32": ("fp32", True),
}


def arm(name: str, shape: str, data: Path) -> dict[str, Any]:
    """Run the steps of one arm in this process."""
    rows, T, warmup, steps = SHAPES[shape]
    how = ARMS[name]
    precision, compile = how or ("fp32", False)
    recipe = Recipe(
        name=shape,
        about="",
        model=GPT2Config(n_layer=4, n_head=4, n_embd=128, block_size=T, vocab_size=257),
        batch=Batch(tokens=rows * T, length=T),
        optim=AdamWConfig(lr=1e-3),
        schedule=Schedule(warmup=0, final=1.0),
        steps=warmup + steps,
        spike=0.0,
    )
    recipe = dataclasses.replace(recipe, model=recipe.model.for_training())
    asked = MachineOptions(device="cpu", precision=precision, compile=compile, micro_batch=rows)
    tokens = shards.open_split(data, shards.read_manifest(data), "train")
    with build(recipe, tokens, resolve(asked)) as trainer:
        step = plain_loop(trainer) if how is None else lambda: trainer.train_step().loss
        ends, loss = [time.perf_counter()], 0.0
        for _ in range(warmup + steps):
            loss = step()
            ends.append(time.perf_counter())
    seconds = [b - a for a, b in pairwise(ends)]
    timed = quantiles([1e3 * s for s in seconds[warmup:]])
    return {
        "ms_per_step": timed,
        "tokens_per_s": round(rows * T / timed["median"] * 1e3),
        "first_step_s": round(seconds[0], 2),  # includes compilation
        "precision": trainer.device.precision,
        "loss": round(loss, 4),
    }


def plain_loop(trainer: Trainer) -> Callable[[], float]:
    """The same model and batches, trained as in a tutorial. Returns the step: it gives the loss."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(trainer.recipe.seed)
    model = GPT2(GPT2Config.from_dict(dataclasses.asdict(trainer.model.config)))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    numbers = count()

    def step() -> float:
        x, y = trainer.batches.batch(next(numbers), trainer.partition)
        x, y = torch.from_numpy(x[0].copy()), torch.from_numpy(y[0].copy())
        optimizer.zero_grad(set_to_none=True)
        _, loss = model(x, y)
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def measure(rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(sources.from_arguments(embedded=True), Path(folder), "bytes", val_tokens=0)
        for shape in SHAPES:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
            for _ in range(rounds):
                for name, done in runs.items():
                    command = [sys.executable, "-m", "benchmarks.small", "--arm", name]
                    command += ["--shape", shape, "--data", folder]
                    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                    done.append(json.loads(printed.splitlines()[-1]))
                    print(f"{shape}: {name}: {done[-1]}", flush=True)
            figures[shape] = _summary(runs, *SHAPES[shape][:2])
    return figures


def _summary(runs: dict[str, list[dict[str, Any]]], rows: int, T: int) -> dict[str, Any]:
    plain = [r["ms_per_step"]["median"] for r in runs["plain eager loop"]]
    arms = {}
    for name, done in runs.items():
        ms = [r["ms_per_step"]["median"] for r in done]
        ratios = [a / b for a, b in zip(plain, ms, strict=True)]  # round by round
        arms[name] = {
            "tokens_per_s": round(rows * T / statistics.median(ms) * 1e3),
            "times_plain": quantiles(ratios),
            "runs": done,
        }
    return {"rows": rows, "length": T, "arms": arms}


def main() -> None:
    parser = argparse.ArgumentParser(description="time small models on a CPU")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.arm:
        print(json.dumps(arm(o.arm, o.shape, o.data)))
        return
    machine = environment("torch", "numpy")
    figures = measure(max(1, o.rounds))
    write_result(o.out, {**machine, "shapes": figures})
    for shape, found in figures.items():
        print(f"{shape}: {found['arms']['rekindle']['times_plain']['median']} x the plain loop")


if __name__ == "__main__":
    main()
