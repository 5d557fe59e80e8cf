"""The ladder: the lecture's optimisations one after the other, then ours, on this machine.

Every rung trains the same model from the same weights on the same tokens, in a process of its own;
only how the step is computed changes. All of it is `train.train_step`, called differently.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from rekindle import __version__, recipes, storage
from rekindle.data import shards
from rekindle.data.batches import Batches, Prefetcher, Split, Windows
from rekindle.errors import UserError
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.shapes import on_meta
from rekindle.observe.console import duration
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Recipe
from rekindle.runtime.device import (
    PEAKS,
    Device,
    cpu_model,
    get_device,
    keep_freed_memory,
    why_not_compile,
)
from rekindle.runtime.distributed import World
from rekindle.session import make_deterministic
from rekindle.train import train_step

LR = 3e-4  # constant, as where the lecture measures its speed
SEED = 1337


@dataclass(frozen=True)
class Levers:
    """How a step is computed; as they stand here, the naive way."""

    precision: str = "fp32"
    threads: int = 0  # of a CPU; 0: as many as torch takes
    attention: str = "plain"
    compile: bool = False
    padded: bool = False  # the vocabulary table, to a multiple of 128 rows
    fused_adamw: bool = False
    micro: int = 16  # rows of one forward pass
    loss_kernel: bool = False
    mlp_kernel: bool = False
    separate_qkv: bool = False
    recompute: bool = False
    keep_memory: bool = False  # what a CPU's tensors give back is used again at once


@dataclass(frozen=True)
class Rung:
    """One more lever pulled, and why it helps."""

    name: str
    change: dict[str, Any]
    why: str


GPU_RUNGS = (
    Rung("fp32", {}, "every number in 32 bits, one kernel after the other: where all begin"),
    Rung("TF32", {"precision": "tf32"}, "tensor cores multiply with 10 bits of mantissa"),
    Rung("bf16", {"precision": "autocast"}, "half the bytes to move, twice the tensor cores' rate"),
    Rung("compile", {"compile": True}, "one kernel for what was many: fewer trips to memory"),
    Rung("flash attention", {"attention": "fused"}, "the T × T scores never leave the chip"),
    Rung("padded vocabulary", {"padded": True}, "50,257 becomes 50,304: tiles without a rest"),
    Rung("lecture", {"fused_adamw": True}, "with AdamW as one kernel: the lecture's last step"),
    Rung("larger micro-batch", {"micro": 64}, "the memory saved takes more rows"),
    Rung("bf16 residual", {"precision": "bf16"}, "the residual stream too, but not the weights"),
    Rung("loss kernel", {"loss_kernel": True}, "the logits' gradient is written over the logits"),
    Rung("MLP kernel", {"mlp_kernel": True}, "GELU inside the matrix products around it"),
    Rung("separate q, k, v", {"separate_qkv": True}, "three gradients that need no copy into one"),
)  # fmt: skip

CPU_RUNGS = (
    Rung("one core", {"threads": 1}, "32-bit arithmetic on one thread: where all begin"),
    Rung("all cores", {"threads": 0}, "matrix products share out well"),
    Rung("fused AdamW", {"fused_adamw": True}, "one pass over the weights instead of a dozen"),
    Rung("bf16", {"precision": "autocast"}, "products of 16-bit numbers, where the CPU has them"),
    Rung("compile", {"compile": True}, "one loop for what was many: fewer trips to memory"),
    Rung("padded vocabulary", {"padded": True}, "50,257 becomes 50,304: rows that fill vectors"),
    Rung("memory kept", {"keep_memory": True}, "the same pages every step, not new ones of zeros"),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What is measured: a model, its data, and so many steps of so many rows."""

    recipe: str
    data: str
    device: str
    rows: int
    steps: int = 20
    warmup: int = 5  # steps that are not timed, compilation among them


def climb(data: Path, out: Path, device: str, recipe: str | None, steps: int) -> dict[str, Any]:
    """Measure all rungs, telling of each, and write `out`/ladder.json; return what is in it.

    Raises `UserError` if the data cannot be used, or if not even the first rung can be measured.
    """
    chosen = get_device(device)
    on_gpu = chosen.torch.type == "cuda"
    name = recipe or ("gpt2-124m" if on_gpu else "gpt2-10m")
    rungs, rows = (GPU_RUNGS, 64) if on_gpu else (CPU_RUNGS, 8)
    if chosen.torch.type == "mps":
        rungs = tuple(r for r in GPU_RUNGS if r.name in ("fp32", "flash attention"))
    work = Work(name, str(data), chosen.torch.type, rows, steps)
    model = recipes.get_recipe(name)
    shards.read_manifest(data)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): give another --out") from None
    print(
        f"{model.name} on {chosen.name}: {steps} steps of {rows} × {model.batch.length} tokens a "
        f"rung, each in a fresh process\n\n"
        + _COLUMNS.format("rung", "ms/step", "tokens/s", "gain", "util", "memory", "loss")
    )
    levers = Levers(micro=min(rows, Levers.micro))
    result = {
        "recipe": name, "rows": rows, "length": model.batch.length,
        "steps": work.warmup + work.steps, **environment(chosen),
    }  # fmt: skip
    measured: list[dict[str, Any]] = []
    for rung in rungs:
        levers = dataclasses.replace(levers, **rung.change)
        if levers.compile and (reason := why_not_compile(chosen.torch)):
            print(f"{rung.name:<20} left out: {reason}")
            levers = dataclasses.replace(levers, compile=False)
            continue
        levers, figures = measure_what_fits(work, levers)
        measured.append({"rung": rung.name, "why": rung.why, **figures})
        print(_line(measured[-1], measured[0]), flush=True)
        storage.write_json(out / "ladder.json", {**result, "rungs": measured})
    return {**result, "rungs": measured}


def environment(device: Device) -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device.name,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "versions": {"rekindle": __version__, "torch": torch.__version__},
    }


def measure_what_fits(work: Work, levers: Levers) -> tuple[Levers, dict[str, Any]]:
    """Halve the micro-batch until it fits into memory."""
    while True:
        figures = measure_in_fresh_process(work, levers)
        if not figures.get("out_of_memory"):
            return levers, figures
        if levers.micro == 1:
            raise UserError(f"not one row of {work.recipe} fits into memory: name a smaller recipe")
        levers = dataclasses.replace(levers, micro=levers.micro // 2)


def measure_in_fresh_process(work: Work, levers: Levers) -> dict[str, Any]:
    """`measure` where nothing before it left a cache, a setting or memory in use."""
    question = json.dumps({"work": asdict(work), "levers": asdict(levers)})
    command = [sys.executable, "-m", "rekindle.ladder", question]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip() or "no message").split("\n")[-1]
        raise UserError(f"the rung with {levers} failed: {last}")
    return json.loads(process.stdout.strip().split("\n")[-1])


def measure(work: Work, levers: Levers) -> dict[str, Any]:
    """Train for a few steps, in this process; return milliseconds, tokens/s, memory and loss."""
    recipe = _recipe(work)
    if levers.threads:
        torch.set_num_threads(levers.threads)
    device = get_device(work.device, levers.precision)
    make_deterministic(device)
    if levers.keep_memory:
        keep_freed_memory(device)
    model = _model(recipe, levers, device)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if levers.compile else model
    optimizer = AdamW(model, AdamWConfig(lr=LR), fused=levers.fused_adamw)
    parameters = list(model.parameters())
    prefetcher = _prefetcher(recipe, work, levers, device)
    ends, losses = [time.perf_counter()], []
    x = y = torch.empty(0)
    for _ in range(work.warmup + work.steps):
        x, y = prefetcher.next()
        result = train_step(
            forward,
            parameters,
            optimizer,
            x,
            y,
            lr=LR,
            clip=1.0,
            limit=math.inf,
            device=device,
            world=World(),
        )
        losses.append(result.loss)
        ends.append(time.perf_counter())
    prefetcher.close()
    seconds = [b - a for a, b in pairwise(ends)]
    timed = seconds[work.warmup :]
    tokens = work.rows * recipe.batch.length
    rate = tokens / median(timed)
    peak = PEAKS.get(device.name)  # of bf16, on every rung, so that utilisation climbs as well
    flops = on_meta(GPT2, recipe.model.for_training()).flops_per_token(recipe.batch.length)
    deciles = quantiles(timed, n=10) if len(timed) > 1 else timed * 9
    return {
        "levers": asdict(levers),
        "ms_per_step": median(timed) * 1e3,
        "ms_per_step_p10": deciles[0] * 1e3,
        "ms_per_step_p90": deciles[-1] * 1e3,
        "tokens_per_s": rate,
        "utilisation": rate * flops / peak if peak else None,
        "first_step_s": seconds[0],  # compilation is in it
        "peak_memory_gib": peak_memory(device) / 2**30,
        "first_loss": losses[0],
        "loss": losses[-1],
        "data_wait_ms": prefetcher.waited / len(seconds) * 1e3,
        "attention_kernel": attention_kernel(forward, x, y, device),
    }


def _recipe(work: Work) -> Recipe:
    """The recipe, for a model of the data's vocabulary."""
    recipe, size = recipes.get_recipe(work.recipe), shards.read_manifest(Path(work.data)).vocab_size
    model = dataclasses.replace(recipe.model, vocab_size=size, padded_vocab_size=size)
    return dataclasses.replace(recipe, model=model)


def _model(recipe: Recipe, levers: Levers, device: Device) -> GPT2:
    """The recipe's model, with the same weights whether its table is padded or not."""
    torch.manual_seed(SEED)
    model = GPT2(recipe.model)
    if levers.padded:
        weights = model.state_dict()
        model = GPT2(recipe.model.for_training())
        table = torch.zeros_like(model.lm_head.weight)
        table[: recipe.model.vocab_size] = weights["lm_head.weight"]
        model.load_state_dict({**weights, "lm_head.weight": table, "transformer.wte.weight": table})
    compute = Compute(
        dtype=device.dtype, attention=levers.attention, loss_kernel=levers.loss_kernel,
        mlp_kernel=levers.mlp_kernel, separate_qkv=levers.separate_qkv, recompute=levers.recompute,
    )  # fmt: skip
    return model.to(device.torch).use(compute)


def _prefetcher(recipe: Recipe, work: Work, levers: Levers, device: Device) -> Prefetcher:
    manifest = shards.read_manifest(Path(work.data))
    windows = Windows(shards.open_split(Path(work.data), manifest, "train"), recipe.batch.length)
    batches = Batches(windows, work.rows, SEED, "shuffled")
    split = Split.of(work.rows, levers.micro)
    last = work.warmup + work.steps
    return Prefetcher(lambda step: batches.batch(step, split), 0, last, device.torch)


def peak_memory(device: Device) -> int:
    """Bytes: of the GPU's memory as torch has taken it, or of the whole process on a CPU."""
    if device.torch.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attention_kernel(forward: Any, x: Tensor, y: Tensor, device: Device) -> str | None:
    """The GPU kernel that torch has chosen for attention, by its own name."""
    if device.torch.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen, device.autocast():
        forward(x[0], y[0])
    names = [event.key for event in seen.key_averages()]
    marks = ("flash", "cudnn", "fmha", "sdpa", "attention")
    return next((n for n in names if any(mark in n.lower() for mark in marks)), None)


_COLUMNS = "{:<20} {:>9} {:>11} {:>7} {:>6} {:>9} {:>8}"


def _line(rung: dict[str, Any], first: dict[str, Any]) -> str:
    rate, used = rung["tokens_per_s"], rung["utilisation"]
    row = _COLUMNS.format(
        rung["rung"], f"{rung['ms_per_step']:,.1f}", f"{rate:,.0f}",
        f"{rate / first['tokens_per_s']:.2f}×", "" if used is None else f"{used:.1%}",
        f"{rung['peak_memory_gib']:.1f} GiB", f"{rung['loss']:.4f}",
    )  # fmt: skip
    return f"{row}   {rung['why']}"


def summary(result: dict[str, Any], seconds: float) -> str:
    """What a person takes home."""
    first, last = result["rungs"][0], result["rungs"][-1]
    return (
        f"\n{last['tokens_per_s'] / first['tokens_per_s']:.1f} times faster than `{first['rung']}`,"
        f" measured in {duration(seconds)}"
    )


def _answer(question: str) -> dict[str, Any]:
    asked = json.loads(question)
    try:
        return measure(Work(**asked["work"]), Levers(**asked["levers"]))
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


if __name__ == "__main__":
    print(json.dumps(_answer(sys.argv[1])))
