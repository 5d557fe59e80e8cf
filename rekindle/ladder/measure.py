"""Measures one rung: runs `train.train_step` for a few steps in its own process.

python -m rekindle.ladder.measure '{"work": {...}, "levers": {...}}'
"""

import dataclasses
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from rekindle import recipes
from rekindle.data import shards
from rekindle.ladder.rungs import Levers
from rekindle.machine import Machine
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.model.shapes import on_meta
from rekindle.optim.adamw import AdamW
from rekindle.optim.adamw_config import AdamWConfig
from rekindle.recipes import Batch, Recipe, Schedule
from rekindle.runtime.device import PEAKS, Device, get_device
from rekindle.runtime.distributed import World
from rekindle.trainer import Trainer, build

LR = 3e-4  # constant, as in the lecture's speed measurements
SEED = 1337


@dataclass(frozen=True)
class Work:
    """What to measure: a model, its data, the number of steps and the rows per step."""

    recipe: str
    data: str
    device: str
    rows: int
    steps: int = 20
    warmup: int = 5  # untimed steps, which include compilation


def measure(work: Work, levers: Levers) -> dict[str, Any]:
    """Train for a few steps, in this process; return milliseconds, tokens/s, memory and loss."""
    with make_trainer(work, levers) as trainer:
        return _measure(trainer, work, levers)


def make_trainer(work: Work, levers: Levers) -> Trainer:
    """A trainer that computes with these levers. Initial weights are the same for all levers."""
    recipe = _recipe(work)
    machine = Machine(
        device=work.device,
        precision=levers.precision,
        compile=levers.compile,
        kernels="none",  # each has its own lever
        deterministic=False,
        shard=False,
        threads=levers.threads or torch.get_num_threads(),
        recompute=levers.recompute,
        micro_batch=levers.micro,
        keep_memory=levers.keep_memory,
    )
    compute = Compute(
        dtype=get_device(work.device, levers.precision).dtype,
        attention=levers.attention,
        separate_qkv=levers.separate_qkv,
        loss_kernel=levers.loss_kernel,
        mlp_kernel=levers.mlp_kernel,
    )
    return build(
        recipe,
        shards.open_split(Path(work.data), shards.read_manifest(Path(work.data)), "train"),
        machine,
        World(),
        model=padded_model if levers.padded else GPT2,
        optimizer=partial(AdamW, fused=levers.fused_adamw),
        compute=compute,
    )


def _measure(trainer: Trainer, work: Work, levers: Levers) -> dict[str, Any]:
    device, length = trainer.device, trainer.recipe.batch.length
    ends, losses = [time.perf_counter()], []
    for _ in range(work.warmup + work.steps):
        losses.append(trainer.train_step().loss)
        ends.append(time.perf_counter())
    seconds = [b - a for a, b in pairwise(ends)]
    timed = seconds[work.warmup :]
    rate = work.rows * length / median(timed)
    peak = PEAKS.get(device.name)  # the bf16 peak on every rung, so that MFUs are comparable
    config: GPT2Config = trainer.recipe.model  # type: ignore[assignment]
    flops = on_meta(GPT2, config.for_training()).flops_per_token(length)
    deciles = quantiles(timed, n=10) if len(timed) > 1 else timed * 9
    return {
        "levers": asdict(levers),
        "ms_per_step": median(timed) * 1e3,
        "ms_per_step_p10": deciles[0] * 1e3,
        "ms_per_step_p90": deciles[-1] * 1e3,
        "tokens_per_s": rate,
        "utilisation": rate * flops / peak if peak else None,
        "first_step_s": seconds[0],  # includes compilation
        "peak_memory_gib": peak_memory(device) / 2**30,
        "first_loss": losses[0],
        "loss": losses[-1],
        "data_wait_ms": trainer.data_wait_s / len(seconds) * 1e3,
        "attention_kernel": attention_kernel(trainer),
    }


def _recipe(work: Work) -> Recipe:
    """The recipe with a constant learning rate and the data's vocabulary size."""
    recipe = recipes.get_recipe(work.recipe)
    size = shards.read_manifest(Path(work.data)).vocab_size
    length = recipe.batch.length
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, vocab_size=size, padded_vocab_size=size),
        batch=Batch(tokens=work.rows * length, length=length),
        optim=AdamWConfig(lr=LR),
        schedule=Schedule(warmup=0, final=1.0),
        steps=work.warmup + work.steps,
        spike=0.0,
        seed=SEED,
    )


def padded_model(config: GPT2Config) -> GPT2:
    """The model with a padded embedding; all other weights equal those of the unpadded model."""
    weights = GPT2(config).state_dict()
    model = GPT2(config.for_training())
    embedding = torch.zeros_like(model.lm_head.weight)
    embedding[: config.vocab_size] = weights["lm_head.weight"]
    tied = {"lm_head.weight": embedding, "transformer.wte.weight": embedding}
    model.load_state_dict({**weights, **tied})
    return model


def peak_memory(device: Device) -> int:
    """Peak memory in bytes: allocated by torch on a GPU, or of the process on a CPU."""
    if device.torch.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attention_kernel(trainer: Trainer) -> str | None:
    """The name of the GPU kernel that torch chose for attention; None on a CPU."""
    if trainer.device.torch.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    x, y = (torch.from_numpy(a[0].copy()) for a in trainer.batches.batch(0, trainer.partition))
    x, y = x.to(trainer.device.torch), y.to(trainer.device.torch)
    with profile(activities=[ProfilerActivity.CUDA]) as seen, trainer.device.autocast():
        trainer.forward(x, y)
    names = [event.key for event in seen.key_averages()]
    marks = ("flash", "cudnn", "fmha", "sdpa", "attention")
    return next((n for n in names if any(mark in n.lower() for mark in marks)), None)


def _handle(request: str) -> dict[str, Any]:
    values = json.loads(request)
    try:
        return measure(Work(**values["work"]), Levers(**values["levers"]))
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}


if __name__ == "__main__":
    print(json.dumps(_handle(sys.argv[1])))
