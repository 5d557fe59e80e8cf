"""The GPU's table, a command a row; in this order of importance, each at most 8 minutes:

    python -m benchmarks.gpu step       --data DIR   # tokens/s beside the lecture's configuration
    python -m benchmarks.gpu gate       --data DIR   # is the fast arithmetic right?
    python -m benchmarks.gpu sizes      --data DIR   # medium, large, XL
    python -m benchmarks.gpu hellaswag  --file FILE
    python -m benchmarks.gpu generate
    python -m benchmarks.gpu rehearsal  --data DIR   # the 10-billion-token command, killed once

Each writes benchmarks/results/gpu-NAME.json after every arm. Needs this repository and a folder of
shards (or none: then Python's manual, as GPT-2's tokens). `--device cpu --recipe gpt2-10m` tries a
command where there is no GPU; what it then measures says nothing.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gate, rehearsal
from benchmarks.common import environment, quantiles, write_result
from benchmarks.cool_down import cool_down
from rekindle import recipes
from rekindle.data import shards, sources
from rekindle.data.prepare import prepare
from rekindle.errors import UserError
from rekindle.ladder import Levers, Work, measure_what_fits
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device, get_device

RESULTS = Path(__file__).parent / "results"

# What the lecture ends with, from Rekindle's own code, at the micro-batch that fits such a card.
LECTURE = Levers(
    precision="autocast", attention="fused", compile=True, padded=True, fused_adamw=True, micro=64
)
BF16 = dataclasses.replace(LECTURE, precision="bf16")
KERNELS = dataclasses.replace(BF16, loss_kernel=True, mlp_kernel=True)
ARMS = {
    "lecture, eager": dataclasses.replace(LECTURE, compile=False),
    "lecture": LECTURE,
    "bf16": BF16,
    "bf16 + loss kernel": dataclasses.replace(BF16, loss_kernel=True),
    "bf16 + MLP kernel": dataclasses.replace(BF16, mlp_kernel=True),
    "bf16 + separate qkv": dataclasses.replace(BF16, separate_qkv=True),
    "bf16 + kernels": KERNELS,
    "all": dataclasses.replace(KERNELS, separate_qkv=True),
}
# The repeats show the noise: a gap below twice theirs is none.
ORDER = "lecture;bf16;bf16 + kernels;lecture;bf16;bf16 + kernels;lecture, eager"
NAMES = ("step", "gate", "sizes", "hellaswag", "generate", "rehearsal")


def step(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Tokens per second of each arm: fresh processes, the same tokens, medians of 30 steps."""
    rows = _rows(o)
    work = Work(o.recipe, str(o.data), o.device, rows, steps=o.steps, warmup=max(1, o.steps // 3))
    runs: list[dict[str, Any]] = []
    for name in o.arms.split(";"):
        levers = dataclasses.replace(ARMS[name], micro=min(ARMS[name].micro, rows))
        runs.append({"arm": name, **measure_what_fits(work, levers)[1]})
        print(f"{name:24} {runs[-1]['tokens_per_s']:>10,.0f} tokens/s", flush=True)
        save({"recipe": o.recipe, "rows": rows, "runs": runs, "arms": _compare(runs)})


def _compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each arm its rate, its repeats' spread, and how it stands to the lecture's."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        rates.setdefault(run["arm"], []).append(run["tokens_per_s"])
    middle = {name: sum(found) / len(found) for name, found in rates.items()}
    return {
        name: {
            "tokens_per_s": round(middle[name]),
            "spread": round((max(found) - min(found)) / middle[name], 4),
            "times_lecture": round(middle[name] / middle["lecture"], 3)
            if "lecture" in middle
            else None,
        }
        for name, found in rates.items()
    }


def _rows(o: argparse.Namespace) -> int:
    """Rows of the recipe's step, or of as much as there is data for."""
    recipe = recipes.get_recipe(o.recipe)
    windows = shards.read_manifest(o.data).tokens("train") // recipe.batch.length
    rows = recipe.batch.rows
    while rows > windows:
        rows //= 2
    return rows


def run_gate(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Ten steps against float64, with planted bugs; then the loss after whole cool-downs."""
    device = get_device(o.device, "fp32")
    recipe = recipes.get_recipe(o.recipe)
    T = min(256, recipe.batch.length)
    tokens = shards.open_split(o.data, shards.read_manifest(o.data), "train")[0]
    count = gate.STEPS * 2 * 2 * (T + 1)
    batch = torch.from_numpy(tokens[:count].astype("int64")).view(gate.STEPS, 2, 2, T + 1)
    plain = dataclasses.replace(recipe.model, padded_vocab_size=recipe.model.vocab_size)
    trial = gate.Trial.make(plain, batch.to(device.torch))  # type: ignore

    def compiled(model: GPT2) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True, dynamic=False)

    ways = {"fp32, compiled": Compute(), "separate q, k, v": Compute(separate_qkv=True)}
    result: dict[str, Any] = {"updates": gate.check(trial, ways, device, compiled)}
    print(f"updates: passed {result['updates']['passed']}", flush=True)
    result["bf16"] = _bf16_errors(trial, device, compiled)
    save(result)
    cool_down(o, lambda found: save({**result, "cool_down": found}))


def _bf16_errors(trial: gate.Trial, device: Device, compiled: Any) -> dict[str, float]:
    """How far bf16 moves the weights from float64's way: by PyTorch, and by the kernels, which
    must not be worse."""
    bf16 = Compute(dtype=torch.bfloat16)
    ways = {"pytorch": bf16}
    if device.torch.type == "cuda":
        ways["kernels"] = dataclasses.replace(bf16, loss_kernel=True, mlp_kernel=True)
    half = dataclasses.replace(device, precision="bf16")
    reference = gate.plain_updates(trial)
    return {
        name: gate.distance(gate.fast_updates(trial, compute, half, compiled), reference)[0]
        for name, compute in ways.items()
    }


def sizes(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Tokens per second and memory of the four sizes, and what recomputing activations gives."""
    found: list[dict[str, Any]] = []
    best = dataclasses.replace(BF16, micro=32)
    for name in ("gpt2-124m", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        for recompute in (False, True):
            levers = dataclasses.replace(best, recompute=recompute)
            work = Work(name, str(o.data), o.device, 32, steps=6, warmup=2)
            try:
                _, figures = measure_what_fits(work, levers)
            except UserError as error:  # not even one row
                figures = {"out_of_memory": True}
                print(error, flush=True)
            found.append({"recipe": name, "recompute": recompute, **figures})
            print(name, recompute, figures.get("tokens_per_s"), flush=True)
            save({"runs": found})


def hellaswag(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Seconds for all questions, after one pass that compiles and warms up."""
    from rekindle.data.tokenizer import get_tokenizer
    from rekindle.evaluate.scoring import evaluate, pack
    from rekindle.evaluate.tasks.hellaswag import HellaSwag
    from rekindle.runtime.device import choose_compute

    device = get_device(o.device)
    model = GPT2(recipes.get_recipe(o.recipe).model.for_training()).to(device.torch)
    model.use(choose_compute(device, model.config.block_size))
    task, tokenizer = HellaSwag(), get_tokenizer("gpt2")
    began = time.perf_counter()
    items = task.load(str(o.file) if o.file else "hub", tokenizer)[: o.limit]
    (packed,) = pack([(task, items)], model.config.block_size, device, compiled=True)
    packing = time.perf_counter() - began
    body = torch.compile(model.transformer, fullgraph=True, dynamic=False)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        evaluate(model, packed, device, body=body)
        seconds.append(time.perf_counter() - began)
        print(f"{seconds[-1]:.2f} s", flush=True)
        if len(seconds) > 2:
            result = {"questions": len(items), "packing_s": packing, "first_pass_s": seconds[0]}
            save({**result, "seconds": quantiles(seconds[1:])})


def generate(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """`benchmarks.generate` on this device, which writes the file itself."""
    command = [sys.executable, "-m", "benchmarks.generate", "--device", o.device]
    subprocess.run([*command, "--out", str(o.out)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="the GPU's table, a command a row")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--data", type=Path, help="folder of shards (default: Python's manual)")
    parser.add_argument("--file", type=Path, help="HellaSwag, JSON lines or Parquet")
    parser.add_argument("--out", type=Path, help="where the figures go (JSON)")
    parser.add_argument("--arms", default=ORDER, help=f"of step: {'; '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=30, help="of step: timed steps an arm")
    parser.add_argument("--cool-down-steps", type=int, default=100, help="of gate")
    parser.add_argument("--cool-down-tokens", type=int, default=262_144, help="of gate: a step's")
    parser.add_argument("--documents", type=int, default=2000, help="of gate: to score")
    parser.add_argument("--minutes", type=float, default=7.5, help="of rehearsal")
    parser.add_argument("--kill-seed", type=int, default=0, help="of rehearsal: decides the second")
    parser.add_argument("--dollars-per-hour", type=float, help="of rehearsal: what the card costs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--limit", type=int, help="of hellaswag: only the first questions")
    o = parser.parse_args()
    commands = {
        "step": step, "gate": run_gate, "sizes": sizes, "hellaswag": hellaswag,
        "generate": generate, "rehearsal": rehearsal.rehearse,
    }  # fmt: skip
    o.out = o.out or RESULTS / f"gpu-{o.name}.json"
    with tempfile.TemporaryDirectory() as folder:
        try:
            device = get_device(o.device)
            if o.data is None and o.name not in ("hellaswag", "generate"):
                o.data = Path(folder, "data")
                prepare(sources.from_arguments(embedded=True), o.data, val_tokens=100_000)
            machine = {
                "device": device.name,
                **environment("torch", *(["triton"] if device.torch.type == "cuda" else [])),
                **(clocks() if device.torch.type == "cuda" else {}),
            }  # fmt: skip
            commands[o.name](o, lambda result: write_result(o.out, {**machine, **result}))
        except UserError as error:
            print(f"benchmarks: error: {error}", file=sys.stderr)
            sys.exit(2)


def clocks() -> dict[str, Any]:
    """What the driver says of the card."""
    fields = "driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    first = printed.splitlines()[0].split(", ")
    return {"card": dict(zip(fields.split(","), first, strict=False))}


if __name__ == "__main__":
    main()
