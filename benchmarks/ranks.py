"""Measures scaling: a step of the recipe's batch on 1, 2, 4 and 8 ranks of one launch.

    torchrun --nproc-per-node 8 -m benchmarks.gpu scaling

Gradients are averaged in three ways: `none` (not at all, which shows the computation alone), `ddp`
(PyTorch's DDP, as in `rekindle train`), and `flat` (one all-reduce of one buffer after the backward
pass). The additional time of `ddp` and `flat` over `none` is the communication that does not
overlap with computation. For `ddp` it includes the cost of splitting the compiled model at DDP's
buckets.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rekindle import recipes
from rekindle.data import shards
from rekindle.model.gpt2 import GPT2
from rekindle.optim.adamw import AdamW
from rekindle.optim.gradients import clip_gradients, grad_norm
from rekindle.recipes import Recipe
from rekindle.runtime import distributed
from rekindle.runtime.device import Device, choose_compute, get_device

RANKS = (1, 2, 4, 8)
PREDICTIONS = Path(__file__).parent / "results" / "scaling.json"


@dataclass
class Group:
    """The first `size` ranks of a launch, and their model and data."""

    size: int
    handle: Any  # process group; None if there is one rank
    device: Device
    model: GPT2
    compile: bool
    initial: dict[str, Tensor]  # weights at the start of every measurement
    recipe: Recipe
    batch: Tensor  # (accumulation, micro-batch, T + 1) token ids of this rank

    def all_reduce(self, tensor: Tensor, *operation: Any) -> None:
        if self.size > 1:
            dist.all_reduce(tensor, *operation, group=self.handle)

    def barrier(self) -> None:
        if self.size > 1:
            self.all_reduce(torch.zeros(1, device=self.device.torch))
        self.device.synchronize()


def scaling(o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Measure each number of ranks while the other ranks wait. Only rank 0 calls `save`."""
    world = distributed.get_world()
    device = get_device(o.device, local_rank=world.local_rank)
    distributed.connect(world, device.torch)
    recipe = recipes.get_recipe(o.recipe)
    if o.data:
        V = shards.read_manifest(o.data).vocab_size
        smaller = dataclasses.replace(recipe.model, vocab_size=V, padded_vocab_size=V)
        recipe = dataclasses.replace(recipe, model=smaller)
    torch.manual_seed(recipe.seed)
    model = GPT2(recipe.model.for_training()).to(device.torch)
    model.use(choose_compute(device, recipe.batch.length))
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    warm_up = 1 if o.no_compile else 3  # untimed steps
    found: dict[str, Any] = {"recipe": o.recipe, "ranks": {}}
    for size in (n for n in RANKS if n <= world.size):
        handle = dist.new_group(list(range(size))) if world.size > 1 else None
        if world.rank < size:
            batch = _batch(recipe, size, world.rank, o.micro_batch).to(device.torch)
            group = Group(size, handle, device, model, not o.no_compile, initial, recipe, batch)
            found["ranks"][str(size)] = measured = measure(group, o.steps, warm_up)
            if world.is_main:
                print(size, measured, flush=True)
                save(found)
        world.barrier()
    world.close()


def _batch(recipe: Recipe, size: int, rank: int, most: int) -> Tensor:
    """Random tokens for this rank's part of a step, in micro-batches of at most `most` rows."""
    rows = recipe.batch.rows // size
    micro = min(most, rows)
    generator = torch.Generator().manual_seed(rank)
    shape = rows // micro, micro, recipe.batch.length + 1
    return torch.randint(recipe.model.vocab_size, shape, generator=generator)


def measure(group: Group, steps: int, warm_up: int) -> dict[str, Any]:
    """Seconds and tokens/s of each way, seconds of the all-reduce alone, and its overlap."""
    ways = ("none", "ddp", "flat") if group.size > 1 else ("none",)
    tokens = group.size * group.batch[..., 1:].numel()
    seconds, weights = {}, {}
    for way in ways:
        seconds[way] = _slowest(group, _train(group, way, warm_up + steps)[warm_up:])
        weights[way] = torch.cat([p.detach().flatten() for p in group.model.parameters()])
    found: dict[str, Any] = {
        "step_s": {way: round(s, 6) for way, s in seconds.items()},
        "tokens_per_s": {way: round(tokens / s) for way, s in seconds.items()},
        "predicted": _prediction(group.recipe, group.size),
    }
    if group.size > 1:
        alone = _slowest(group, _all_reduces(group, steps))
        exposed = {way: seconds[way] - seconds["none"] for way in ("ddp", "flat")}
        norm = weights["flat"].norm()
        found |= {
            "all_reduce_s": round(alone, 6),
            "bytes": 4 * weights["flat"].numel(),
            "exposed_s": {way: round(s, 6) for way, s in exposed.items()},
            "overlap": {way: round(min(1.0, 1 - s / alone), 3) for way, s in exposed.items()},
            # `ddp` averages the same gradients as `flat`, within rounding; `none` does not.
            "apart_from_flat": {
                way: float((weights[way] - weights["flat"]).norm() / norm)
                for way in ("ddp", "none")
            },
        }
    return found


def _train(group: Group, way: str, steps: int) -> list[float]:
    """Train from the initial weights. Returns the seconds of each step."""
    model, device, batch = group.model, group.device, group.batch
    model.load_state_dict(group.initial)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), device=device.torch)
    for p, view in zip(parameters, flat.split(sizes), strict=True):
        p.grad = None if way == "ddp" else view.view_as(p)  # DDP allocates its own buffers
    forward: Any = model
    if group.compile:
        torch._dynamo.reset()  # a model compiled within DDP is split at its buckets
        forward = torch.compile(model, fullgraph=True, dynamic=False)
    if way == "ddp":
        forward = DistributedDataParallel(
            forward, [device.torch] if device.torch.type == "cuda" else None,
            process_group=group.handle, gradient_as_bucket_view=True,
        )  # fmt: skip
    optimizer = AdamW(model, group.recipe.optim)
    optimizer.set_lr(group.recipe.optim.lr)
    no_skip = torch.zeros((), dtype=torch.bool, device=device.torch)
    seconds = []
    for _ in range(steps):
        group.barrier()
        began = time.perf_counter()
        for p in parameters:
            if p.grad is not None:
                p.grad.zero_()
        for i, rows in enumerate(batch):
            last = i == len(batch) - 1
            with forward.no_sync() if way == "ddp" and not last else nullcontext():
                with device.autocast():
                    loss = forward(rows[:, :-1], rows[:, 1:])[1]
                (loss / len(batch)).backward()
        if way == "flat":
            group.all_reduce(flat)
            flat /= group.size
        clip_gradients(parameters, group.recipe.grad_clip, grad_norm(parameters))
        optimizer.step(no_skip)
        device.synchronize()
        seconds.append(time.perf_counter() - began)
    for p in parameters:
        p.grad = None
    return seconds


def _all_reduces(group: Group, times: int) -> list[float]:
    """Seconds of an all-reduce of all gradients, without computation at the same time."""
    flat = torch.zeros(sum(p.numel() for p in group.model.parameters()), device=group.device.torch)
    seconds = []
    for _ in range(1 + times):  # the first one opens the connections
        group.barrier()
        began = time.perf_counter()
        group.all_reduce(flat)
        group.device.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _slowest(group: Group, seconds: list[float]) -> float:
    """The largest median of any rank."""
    found = torch.tensor(median(seconds), dtype=torch.float64, device=group.device.torch)
    group.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _prediction(recipe: Recipe, size: int) -> dict[str, Any] | None:
    """The prediction of `benchmarks.scaling` for `size` H100s, or None."""
    if not PREDICTIONS.exists():
        return None
    model = json.loads(PREDICTIONS.read_text())["models"].get(recipe.name)
    row = model["ranks"].get(str(size)) if model else None
    keys = ("tokens_per_s", "tokens_per_s_overlapped", "all_reduce_ms", "overlap_ms")
    return {key: row[key] for key in keys} if row else None
