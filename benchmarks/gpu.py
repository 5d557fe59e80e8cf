"""The GPU benchmarks, one command each, and a command that runs all of them:

    python -m benchmarks.gpu all --minutes 9.5 --out DIR   # --done DIR runs the remaining arms
    torchrun --nproc-per-node 8 -m benchmarks.gpu scaling  # 1, 2, 4 and 8 ranks

    python -m benchmarks.gpu step       --data DIR   # tokens/s, compared with the lecture
    python -m benchmarks.gpu gate       --data DIR   # correctness of the fast step
    python -m benchmarks.gpu sizes      --data DIR   # medium, large, XL
    python -m benchmarks.gpu hellaswag  --file FILE
    python -m benchmarks.gpu generate
    python -m benchmarks.gpu rehearsal  --data DIR   # the 10-billion-token command, killed once

`benchmarks.plan` describes `all`. The others write benchmarks/results/gpu-NAME.json after every
arm. They need this repository and a folder of shards. Without --data they use the data in a folder
from `benchmarks.pack`, or else Python's manual in GPT-2's tokens. `--device cpu --recipe gpt2-10m`
is a trial of a command without a GPU; its figures are meaningless.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import card, cool_down, definitions, first_minute, gate, plan, ranks, rehearsal
from benchmarks import generate as generation
from benchmarks.common import PACKED, quantiles, write_result
from benchmarks.measured import measure_what_fits
from benchmarks.predicted import prediction
from benchmarks.record import Record
from benchmarks.ways import ARMS, BF16, BF16_WAYS, EXACT_WAYS
from rekindle import recipes
from rekindle.data import shards, sources
from rekindle.data.prepare import prepare
from rekindle.errors import UserError
from rekindle.ladder import Work
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device, get_device
from rekindle.runtime.distributed import get_world

RESULTS = Path(__file__).parent / "results"
# The repeats show the noise. A difference below twice the noise is not significant.
ORDER = (
    "lecture;bf16;bf16 + loss kernel;bf16 + kernels;"
    "lecture;bf16;bf16 + loss kernel;bf16 + kernels;lecture, eager"
)
SIZES = "gpt2-124m;gpt2-medium;gpt2-large;gpt2-xl"
Save = Callable[..., None]  # takes a result, and optionally a table of the profiler


def step(o: argparse.Namespace, save: Save) -> None:
    """Tokens/s of each arm, from the median step. All arms read the same data."""
    rows = _rows(o)
    work = Work(o.recipe, str(o.data), o.device, rows, steps=o.steps, warmup=max(1, o.steps // 3))
    runs: list[dict[str, Any]] = []
    names = (o.arms or ORDER).split(";")
    for name in names:
        levers = ARMS[name]
        compiled = levers.compile and not o.no_compile
        levers = dataclasses.replace(levers, micro=min(levers.micro, rows), compile=compiled)
        figures = measure_what_fits(work, levers, here=len(names) == 1)
        table = figures.pop("kernel_table", "")
        if figures.get("out_of_memory"):
            raise UserError(f"one row of {o.recipe} does not fit in memory: use a smaller recipe")
        expected = prediction(name, get_device(o.device).name)
        runs.append({"arm": name, **figures, "predicted": expected})
        print(f"{name:24} {runs[-1]['tokens_per_s']:>10,.0f} tokens/s, predicted {expected}")
        save({"recipe": o.recipe, "rows": rows, "runs": runs, "arms": compare(runs)}, table)


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean rate of each arm, the spread of its repeats (None for a single run), and its rate
    relative to `lecture`."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        rates.setdefault(run["arm"], []).append(run["tokens_per_s"])
    middle = {name: sum(found) / len(found) for name, found in rates.items()}
    return {
        name: {
            "tokens_per_s": round(middle[name]),
            "spread": round((max(found) - min(found)) / middle[name], 4) if found[1:] else None,
            "times_lecture": round(middle[name] / middle["lecture"], 3)
            if "lecture" in middle
            else None,
        }
        for name, found in rates.items()
    }


def _rows(o: argparse.Namespace) -> int:
    """Rows of the recipe's batch, halved until the data has enough of them."""
    recipe = recipes.get_recipe(o.recipe)
    windows = shards.read_manifest(o.data).tokens("train") // recipe.batch.length
    rows = recipe.batch.rows
    while rows > windows:
        rows //= 2
    return rows


def run_gate(o: argparse.Namespace, save: Save) -> None:
    """Compare ten steps with float64, and plant bugs; then compare losses after full schedules."""
    device = get_device(o.device, "fp32")
    recipe, manifest = recipes.get_recipe(o.recipe), shards.read_manifest(o.data)
    T = min(256, recipe.batch.length)
    tokens = shards.open_split(o.data, manifest, "train")[0]
    count = gate.STEPS * 2 * 2 * (T + 1)
    batch = torch.from_numpy(tokens[:count].astype("int64")).view(gate.STEPS, 2, 2, T + 1)
    V = manifest.vocab_size
    plain = dataclasses.replace(recipe.model, vocab_size=V, padded_vocab_size=V)
    trial = gate.Trial.make(plain, batch.to(device.torch))  # type: ignore

    def compiled(model: GPT2) -> Any:
        torch._dynamo.reset()
        return model if o.no_compile else torch.compile(model, fullgraph=True, dynamic=False)

    result: dict[str, Any] = {"updates": gate.check(trial, EXACT_WAYS, device, compiled)}
    print(f"updates: passed {result['updates']['passed']}", flush=True)
    save(result)
    result["bf16"] = _bf16_errors(trial, device, compiled)
    save(result)
    if o.cool_down_steps:
        cool_down.cool_down(o, lambda found: save({**result, "cool_down": found}))


def _bf16_errors(trial: gate.Trial, device: Device, compiled: Any) -> dict[str, float]:
    """The error of the weight updates in bf16, relative to float64, with PyTorch and with the
    kernels, which must not be worse."""
    half = dataclasses.replace(device, precision="bf16")
    reference = gate.plain_updates(trial)
    return {
        name: gate.distance(gate.fast_updates(trial, compute, half, compiled), reference)[0]
        for name, compute in BF16_WAYS.items()
        if name == "pytorch" or device.torch.type == "cuda"
    }


def sizes(o: argparse.Namespace, save: Save) -> None:
    """Tokens/s and memory of the four sizes, with and without recomputing activations."""
    found: list[dict[str, Any]] = []
    choices = (False, True) if o.recompute is None else (o.recompute,)
    arms = [(name, recompute) for name in o.sizes.split(";") for recompute in choices]
    for name, recompute in arms:
        levers = dataclasses.replace(BF16, micro=32, compile=not o.no_compile, recompute=recompute)
        work = Work(name, str(o.data), o.device, 32, steps=6, warmup=2)
        figures = measure_what_fits(work, levers, here=len(arms) == 1)
        table = figures.pop("kernel_table", "")
        found.append({"recipe": name, "recompute": recompute, **figures})
        print(name, recompute, figures.get("tokens_per_s"), flush=True)
        save({"runs": found}, table)


def hellaswag(o: argparse.Namespace, save: Save) -> None:
    """Seconds for all questions, after a first pass that compiles the model."""
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
    compiled = not o.no_compile
    (packed,) = pack([(task, items)], model.config.block_size, device, compiled=compiled)
    packing = time.perf_counter() - began
    body: Any = model.transformer
    if compiled:
        body = torch.compile(body, fullgraph=True, dynamic=False)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        evaluate(model, packed, device, body=body)
        seconds.append(time.perf_counter() - began)
        print(f"{seconds[-1]:.2f} s", flush=True)
        if len(seconds) > 2:
            result = {"questions": len(items), "packing_s": packing, "first_pass_s": seconds[0]}
            save({**result, "seconds": quantiles(seconds[1:])})


def generate(o: argparse.Namespace, save: Save) -> None:
    """Run `benchmarks.generate` on this device with a model of the recipe's size."""
    model = recipes.get_recipe(o.recipe).model
    config = dataclasses.replace(model, padded_vocab_size=model.vocab_size)
    generation.measure(torch.device(o.device), o.rounds, o.new_tokens, config, save)


COMMANDS: dict[str, Callable[[argparse.Namespace, Save], None]] = {
    "scaling": ranks.scaling,
    "step": step, "gate": run_gate, "sizes": sizes, "hellaswag": hellaswag, "generate": generate,
    "rehearsal": rehearsal.rehearse,
    "versions": card.versions, "kernels": definitions.check, "train": first_minute.train,
    "cool-down": cool_down.one,
}  # fmt: skip
WITHOUT_DATA = ("scaling", "hellaswag", "generate", "versions", "kernels")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the GPU benchmarks")
    parser.add_argument("name", choices=("all", *COMMANDS))
    parser.add_argument("--data", type=Path, help="folder of shards (default: Python's manual)")
    parser.add_argument("--file", type=Path, help="HellaSwag, JSON lines or Parquet")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; all: folder for its three files"
    )
    parser.add_argument("--done", type=Path, help="all: --out of an earlier call")
    parser.add_argument("--minutes", type=float, default=7.5, help="all, rehearsal: time limit")
    parser.add_argument("--arms", help=f"step: {'; '.join(ARMS)} (default: {ORDER})")
    parser.add_argument("--steps", type=int, default=30, help="step: timed steps per arm")
    parser.add_argument("--sizes", default=SIZES, help="sizes: recipes, separated by semicolons")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, help="sizes (default: both)"
    )
    parser.add_argument("--micro-batch", type=int, default=64, help="scaling: largest micro-batch")
    parser.add_argument(
        "--cool-down-steps", type=int, default=100, help="gate, cool-down: 0 disables it"
    )
    parser.add_argument(
        "--cool-down-tokens", type=int, default=262_144, help="gate, cool-down: tokens per step"
    )
    parser.add_argument(
        "--documents", type=int, default=2000, help="gate, cool-down: documents to score"
    )
    parser.add_argument("--seconds", type=float, default=60, help="train: after the first step")
    parser.add_argument("--rehearsal-minutes", type=float, default=4, help="all")
    parser.add_argument("--kill-seed", type=int, default=0, help="rehearsal: seed of the kill time")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="rehearsal: steps")
    parser.add_argument("--dollars-per-hour", type=float, help="rehearsal: price of the GPU")
    parser.add_argument("--rounds", type=int, default=5, help="generate")
    parser.add_argument("--new-tokens", type=int, default=32, help="generate: at batch 1")
    parser.add_argument("--limit", type=int, help="hellaswag: number of questions")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--no-compile", action="store_true", help="for a quick trial")
    parser.add_argument("--record", nargs=2, metavar=("DIR", "ARM"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    o = make_parser().parse_args()
    if PACKED.exists():
        o.data = o.data or PACKED.parent / "data"
        o.file = o.file or next(PACKED.parent.glob("hellaswag.*"), None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if o.data is None and o.name not in WITHOUT_DATA:
                o.data = Path(folder, "data")
                prepare(sources.from_arguments(embedded=True), o.data, val_tokens=100_000)
            if o.name == "all":
                return plan.run(o)
            COMMANDS[o.name](o, _saver(o))
        except UserError as error:
            print(f"benchmarks: error: {error}", file=sys.stderr)
            sys.exit(2)


def _saver(o: argparse.Namespace) -> Save:
    """A function that saves results with the machine's description, to a JSON file or to the files
    of `all`."""
    machine = card.describe(get_device(o.device, local_rank=get_world().local_rank))
    out = o.out or RESULTS / f"gpu-{o.name}.json"

    def save(result: dict[str, Any], table: str = "") -> None:
        if o.record:
            record = Record(Path(o.record[0]))
            record.result(o.record[1], {**machine, "result": result})
            if table:
                record.table(o.record[1], table)
        else:
            write_result(out, {**machine, **result})
            if table:
                print(table, flush=True)

    return save


if __name__ == "__main__":
    main()
