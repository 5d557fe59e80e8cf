"""The GPU's table, a command a row, and all of them in one command:

    python -m benchmarks.gpu all --minutes 9.5 --out DIR   # again with --done DIR: what is left
    torchrun --nproc-per-node 8 -m benchmarks.gpu scaling  # 1, 2, 4 and 8 ranks

    python -m benchmarks.gpu step       --data DIR   # tokens/s beside the lecture's configuration
    python -m benchmarks.gpu gate       --data DIR   # is the fast arithmetic right?
    python -m benchmarks.gpu sizes      --data DIR   # medium, large, XL
    python -m benchmarks.gpu hellaswag  --file FILE
    python -m benchmarks.gpu generate
    python -m benchmarks.gpu rehearsal  --data DIR   # the 10-billion-token command, killed once

`all` is described in `benchmarks.plan`. The others write benchmarks/results/gpu-NAME.json after
every arm. Each needs this repository and a folder of shards (or none: then what `benchmarks.pack`
has put beside it, or else Python's manual, as GPT-2's tokens). `--device cpu --recipe gpt2-10m`
tries a command where there is no GPU; what it then measures says nothing.
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
# The repeats show the noise: a gap below twice theirs is none.
ORDER = "lecture;bf16;bf16 + kernels;lecture;bf16;bf16 + kernels;lecture, eager"
SIZES = "gpt2-124m;gpt2-medium;gpt2-large;gpt2-xl"
Save = Callable[..., None]  # a result, and perhaps a table of the profiler


def step(o: argparse.Namespace, save: Save) -> None:
    """Tokens per second of each arm: fresh processes, the same tokens, medians of the steps."""
    rows = _rows(o)
    work = Work(o.recipe, str(o.data), o.device, rows, steps=o.steps, warmup=max(1, o.steps // 3))
    runs: list[dict[str, Any]] = []
    for name in (o.arms or ORDER).split(";"):
        levers = ARMS[name]
        compiled = levers.compile and not o.no_compile
        levers = dataclasses.replace(levers, micro=min(levers.micro, rows), compile=compiled)
        figures = measure_what_fits(work, levers)
        table = figures.pop("kernel_table", "")
        if figures.get("out_of_memory"):
            raise UserError(f"not one row of {o.recipe} fits into memory: name a smaller recipe")
        expected = prediction(name, get_device(o.device).name)
        runs.append({"arm": name, **figures, "predicted": expected})
        print(f"{name:24} {runs[-1]['tokens_per_s']:>10,.0f} tokens/s, predicted {expected}")
        save({"recipe": o.recipe, "rows": rows, "runs": runs, "arms": compare(runs)}, table)


def compare(runs: list[dict[str, Any]]) -> dict[str, Any]:
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


def run_gate(o: argparse.Namespace, save: Save) -> None:
    """Ten steps against float64, with planted bugs; then the loss after whole cool-downs."""
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
    result["bf16"] = _bf16_errors(trial, device, compiled)
    save(result)
    if o.cool_down_steps:
        cool_down.cool_down(o, lambda found: save({**result, "cool_down": found}))


def _bf16_errors(trial: gate.Trial, device: Device, compiled: Any) -> dict[str, float]:
    """How far bf16 moves the weights from float64's way: by PyTorch, and by the kernels, which
    must not be worse."""
    half = dataclasses.replace(device, precision="bf16")
    reference = gate.plain_updates(trial)
    return {
        name: gate.distance(gate.fast_updates(trial, compute, half, compiled), reference)[0]
        for name, compute in BF16_WAYS.items()
        if name == "pytorch" or device.torch.type == "cuda"
    }


def sizes(o: argparse.Namespace, save: Save) -> None:
    """Tokens per second and memory of the four sizes, and what recomputing activations gives."""
    found: list[dict[str, Any]] = []
    for name in o.sizes.split(";"):
        for recompute in (False, True) if o.recompute is None else (o.recompute,):
            levers = dataclasses.replace(
                BF16, micro=32, compile=not o.no_compile, recompute=recompute
            )
            work = Work(name, str(o.data), o.device, 32, steps=6, warmup=2)
            figures = measure_what_fits(work, levers)
            table = figures.pop("kernel_table", "")
            found.append({"recipe": name, "recompute": recompute, **figures})
            print(name, recompute, figures.get("tokens_per_s"), flush=True)
            save({"runs": found}, table)


def hellaswag(o: argparse.Namespace, save: Save) -> None:
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
    """`benchmarks.generate` on this device, with a model of the recipe's size."""
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
    parser = argparse.ArgumentParser(description="the GPU's table, a command a row")
    parser.add_argument("name", choices=("all", *COMMANDS))
    parser.add_argument("--data", type=Path, help="folder of shards (default: Python's manual)")
    parser.add_argument("--file", type=Path, help="HellaSwag, JSON lines or Parquet")
    parser.add_argument(
        "--out", type=Path, help="where the figures go (JSON); of all: a folder for its three files"
    )
    parser.add_argument("--done", type=Path, help="of all: --out of the call before")
    parser.add_argument("--minutes", type=float, default=7.5, help="of all, and of rehearsal")
    parser.add_argument("--arms", help=f"of step: {'; '.join(ARMS)} (default: {ORDER})")
    parser.add_argument("--steps", type=int, default=30, help="of step: timed steps an arm")
    parser.add_argument("--sizes", default=SIZES, help="of sizes: recipes")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, help="of sizes (default: both)"
    )
    parser.add_argument("--micro-batch", type=int, default=64, help="of scaling: rows at most")
    parser.add_argument("--cool-down-steps", type=int, default=100, help="of gate; 0: none")
    parser.add_argument("--cool-down-tokens", type=int, default=262_144, help="of gate: a step's")
    parser.add_argument("--documents", type=int, default=2000, help="of gate: to score")
    parser.add_argument("--seconds", type=float, default=60, help="of train: after its first step")
    parser.add_argument("--rehearsal-minutes", type=float, default=4, help="of all")
    parser.add_argument("--kill-seed", type=int, default=0, help="of rehearsal: decides the second")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="of rehearsal: steps")
    parser.add_argument("--dollars-per-hour", type=float, help="of rehearsal: what the card costs")
    parser.add_argument("--rounds", type=int, default=5, help="of generate")
    parser.add_argument("--new-tokens", type=int, default=32, help="of generate: at batch 1")
    parser.add_argument("--limit", type=int, help="of hellaswag: only the first questions")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--no-compile", action="store_true", help="only to try a command")
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
    """Where results go, with what they depend on: a JSON file, or the files of `all`."""
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
