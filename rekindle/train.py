"""Training: the step on one screen, and the loop around it.

Start reading at `train_step`. What happens now and then (validate, sample, save) is a plain
`if due(...)` in `train`; there are no callbacks. `start` builds what both work on.
"""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rekindle.data import shards
from rekindle.data.batches import Batches, Prefetcher, Split, Windows
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError
from rekindle.evaluate import hellaswag
from rekindle.evaluate.loss import Forward
from rekindle.evaluate.questions import for_training
from rekindle.examine import Examiner
from rekindle.model.gpt2 import GPT2
from rekindle.observe.metrics import Console, Metrics, duration
from rekindle.optim.adamw import GradientBuffer, make_adamw
from rekindle.optim.schedule import learning_rate
from rekindle.recipes import Recipe
from rekindle.run import Run, RunOptions, open_run
from rekindle.runtime import distributed
from rekindle.runtime.device import Device, get_device, keep_freed_memory, why_not_compile
from rekindle.runtime.distributed import World
from rekindle.runtime.fit import choose_compute, choose_micro, must_recompute
from rekindle.runtime.saving import Saver

GIVE_UP_AFTER = 10  # refused steps in a row


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, over all ranks. `accepted`: the weights were updated."""

    loss: float
    norm: float  # of the gradient, before clipping
    accepted: bool


def train_step(
    forward: Forward,
    gradients: GradientBuffer,
    optimizer: torch.optim.Optimizer,
    x: Tensor,  # (accumulation, micro, T) token ids of this rank
    y: Tensor,  # the same, one token on
    *,
    lr: float,
    clip: float,
    device: Device,
    world: World,
) -> StepResult:
    """One update of the weights from one global batch; refused as a whole if it is not finite."""
    gradients.reset()
    loss = torch.zeros((), device=x.device)
    share = 1 / (len(x) * world.size)  # a mean over micro-steps and ranks is a sum of shares
    for micro_x, micro_y in zip(x, y, strict=True):
        with device.autocast():
            _, micro_loss = forward(micro_x, micro_y)
        assert micro_loss is not None
        (micro_loss * share).backward()  # adds to the gradients of the micro-steps before
        loss += micro_loss.detach() * share
    world.sum_(gradients.flat, loss)  # the only talk between ranks: once a step

    norm = gradients.norm()
    seen = StepResult(*torch.stack([loss, norm]).tolist(), accepted=True)
    if not (math.isfinite(seen.loss) and math.isfinite(seen.norm)):
        return StepResult(seen.loss, seen.norm, accepted=False)
    if clip and seen.norm > clip:
        gradients.clip(norm, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return seen


def due(step: int, every: int, last: int) -> bool:
    """Whether what comes `every` so many steps comes now; it always comes at the last one."""
    return step == last or (every > 0 and step % every == 0)


def train(recipe: Recipe, data: Path, out: Path, options: RunOptions) -> Run:
    """Train `recipe` on the shards in `data` into the run folder `out`, going on where it stopped.

    Raises `UserError` for whatever the user can mend, before anything is written.
    """
    started = time.perf_counter()
    s = start(recipe, data, out, options)
    recipe, optim, schedule = s.run.recipe, s.run.recipe.optim, s.run.recipe.schedule
    prefetcher = Prefetcher(
        lambda step: s.batches.batch(step, s.split), s.run.step, recipe.steps, s.device.torch
    )
    refused = 0  # steps in a row
    try:
        if s.run.step == 0:
            s.examine(0)
        for step in range(s.run.step, recipe.steps):
            began, prefetcher.waited = time.perf_counter(), 0.0
            x, y = prefetcher.next()
            lr = learning_rate(
                step, peak=optim.lr, warmup=schedule.warmup, steps=recipe.steps,
                final=schedule.final,
            )  # fmt: skip
            result = train_step(
                s.forward, s.gradients, s.optimizer, x, y, lr=lr, clip=optim.clip,
                device=s.device, world=s.world,
            )  # fmt: skip
            s.metrics.step(
                step, loss=result.loss, lr=lr, norm=result.norm, accepted=result.accepted,
                seconds=time.perf_counter() - began, data_wait=prefetcher.waited,
            )  # fmt: skip
            if step == s.run.step:
                s.metrics.console.say(
                    f"first step done {duration(time.perf_counter() - started)} after the start"
                )
            refused = 0 if result.accepted else refused + 1
            if refused == GIVE_UP_AFTER:
                raise UserError(
                    f"the loss or gradient of {refused} steps in a row was not finite (now step "
                    f"{step}): lower --optim.lr and start anew, or fork an earlier checkpoint"
                )
            if due(step + 1, recipe.eval_every, recipe.steps):
                s.examine(step + 1)
            if due(step + 1, recipe.checkpoint_every, recipe.steps):
                s.run.save(step + 1, s.saver)
        s.saver.finish()
    finally:
        prefetcher.close()
        s.saver.close()  # a checkpoint under way is finished, whatever ended the loop
        s.metrics.close()
    s.world.barrier()  # on every rank the last checkpoint is whole from here on
    s.world.close()
    return s.run


@dataclass(frozen=True)
class Session:
    """What a run holds in memory while it trains."""

    run: Run
    world: World
    device: Device
    model: GPT2  # with the clean names that are saved
    forward: Forward  # the model as it is called: compiled, where that can be
    gradients: GradientBuffer
    optimizer: torch.optim.Optimizer
    batches: Batches
    split: Split
    metrics: Metrics
    saver: Saver
    examine: Examiner


def start(recipe: Recipe, data: Path, out: Path, options: RunOptions) -> Session:
    """Check everything a user can get wrong, then build a run's model, data and optimizer, fresh
    or as its newest checkpoint has them, and only then write to its folder."""
    world = distributed.place()
    console = Console(quiet=not world.is_main)
    manifest = shards.read_manifest(data)
    run = open_run(recipe, manifest, data, out, options, world.size)
    if run.threads:
        torch.set_num_threads(run.threads)
    device = get_device(options.device, run.precision, world.local_rank)
    distributed.connect(world, device.torch)
    make_deterministic(device)
    keep_freed_memory(device)
    verify_data(data, manifest, world, console)
    batches, validation = open_data(run, data, manifest)
    questions = for_training(options.hellaswag, device, console.say)

    torch.manual_seed(run.recipe.seed)
    model = GPT2(run.recipe.model)
    if run.checkpoint:
        model.load_state_dict(run.checkpoint.model, strict=False)  # the tied head has no own entry
    compute = choose_compute(device, run.recipe.batch.length, kernels=run.kernels)
    model.to(device.torch).use(compute)
    o = run.recipe.optim
    optimizer = make_adamw(model, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay)
    if run.checkpoint:
        run.checkpoint.restore_optimizer(model, optimizer)
    gradients = GradientBuffer(model.parameters())
    recompute = run.recompute
    if recompute is None:
        recompute = must_recompute(model, batches.windows.T, device, world)
    model.use(compute := dataclasses.replace(compute, recompute=recompute))
    micro = run.micro or choose_micro(model, batches.rows, batches.windows.T, device, world)
    split = Split.of(batches.rows, micro, world.rank, world.size)
    forward, transformer = compile_model(model, run, device, console)

    run.begin(device, compute, split, compiled=forward is not model, console=console)
    metrics = run.open_metrics(device, console, world)
    saver = run.open_saver(model, optimizer, metrics, world)
    tokenizer = get_tokenizer(manifest.tokenizer)
    packed = hellaswag.pack(
        questions, tokenizer, model.config.block_size, device, world,
        compiled=forward is not model,
    )  # fmt: skip
    examine = Examiner(
        run, model, forward, transformer, validation, packed, tokenizer, split.micro, device,
        world, metrics,
    )  # fmt: skip
    return Session(
        run, world, device, model, forward, gradients, optimizer, batches, split, metrics, saver,
        examine,
    )  # fmt: skip


def open_data(run: Run, data: Path, manifest: shards.Manifest) -> tuple[Batches, list]:
    """The training batches of a run and its validation shards."""
    b = run.recipe.batch
    windows = Windows(shards.open_split(data, manifest, "train"), b.length)
    batches = Batches(windows, b.rows, run.recipe.seed, b.order)
    return batches, shards.open_split(data, manifest, "val")


def verify_data(data: Path, manifest: shards.Manifest, world: World, console: Console) -> None:
    """Read every shard once before the first step, on one process of each machine."""
    began = time.perf_counter()
    if world.local_rank == 0:
        shards.verify(data, manifest)
    world.barrier()
    console.say(
        f"data: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation "
        f"tokens, every hash checked in {time.perf_counter() - began:.1f} s"
    )


def make_deterministic(device: Device) -> None:
    """On a CPU the same split gives the same bits. On a GPU this would cost speed."""
    if device.torch.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Nobody reads memory before writing it, and filling it costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compile_model(
    model: GPT2, run: Run, device: Device, console: Console
) -> tuple[Forward, Callable[..., Tensor]]:
    """The model and its body as they are called in training: compiled, if it can be done here.

    The compiled forms share their parameters with `model`, whose names stay clean.
    """
    reason = why_not_compile(device.torch) if run.compile else "as asked"
    if reason:
        console.say(f"running without torch.compile: {reason}")
        return model, model.transformer
    # It warns of a CUDA toolkit without a GPU, which is nothing to a CPU's user.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    console.say(f"compiling the model (kept in {cache}): the first steps take longer")
    return (
        torch.compile(model, fullgraph=True, dynamic=False),
        torch.compile(model.transformer, fullgraph=True, dynamic=False),
    )
