"""What a run holds in memory while it trains: built, restored from checkpoints, closed whole."""

import dataclasses
import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import torch
from torch import Tensor, nn

from rekindle import storage
from rekindle.data import shards
from rekindle.data.batches import Batches, Prefetcher, Split, Windows
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import Stopped, UserError
from rekindle.evaluate import evaluator
from rekindle.evaluate.evaluator import Evaluator
from rekindle.evaluate.loss import Forward
from rekindle.evaluate.scoring import pack
from rekindle.model.compute import Compute
from rekindle.model.gpt2 import GPT2
from rekindle.observe.console import Console, duration
from rekindle.observe.metrics import Metrics
from rekindle.optim import Optimizer
from rekindle.optim.adamw import AdamW
from rekindle.recipes import Recipe
from rekindle.run import Run, RunOptions, is_begun, open_run
from rekindle.runtime import distributed, replicas
from rekindle.runtime.device import Device, get_device, keep_freed_memory, why_not_compile
from rekindle.runtime.distributed import World, data_parallel
from rekindle.runtime.fit import choose_compute, choose_micro, must_recompute
from rekindle.runtime.guard import Guard
from rekindle.runtime.saving import Saver
from rekindle.runtime.sharding import is_sharded, shard
from rekindle.runtime.warm_up import warm_up
from rekindle.runtime.watchdog import Watchdog

GIVE_UP_AFTER = 3  # returns to the same checkpoint


@dataclass
class Session:
    """A run in memory. Used as a context: however it is left, a checkpoint under way is finished
    and the log is closed."""

    run: Run
    world: World
    device: Device
    model: GPT2  # with the clean names that are saved
    forward: Forward  # the model as training calls it: compiled where possible, in DDP if needed
    optimizer: Optimizer
    guard: Guard
    batches: Batches
    unchanged: shards.Unchanged
    split: Split
    metrics: Metrics
    saver: Saver
    evaluator: Evaluator
    watch: Watchdog
    validation: float | None = None  # loss of the last examination
    # To the checkpoint of each step. Whoever goes on from there goes through the same again.
    returns: Counter[int] = field(default_factory=Counter)
    prefetcher: Prefetcher = field(init=False)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def __enter__(self) -> "Session":
        self.prefetch(self.run.batch)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.prefetcher.close()
        self.saver.close()
        self.metrics.close()
        if kind in (None, Stopped):
            self.world.barrier()  # on every rank the last checkpoint is whole from here on
            self.world.close()
        self.watch.close()

    def prefetch(self, batch: int) -> None:
        """Make the batches from this one on ready."""
        last = batch + self.run.recipe.steps - self.run.step
        self.prefetcher = Prefetcher(self.make_batch, batch, last, self.device.torch)

    def warm_up(self) -> None:
        """Compile, and let DDP settle, on the first micro-batch of the next step."""
        if self.run.step >= self.run.recipe.steps:
            return
        self.watch.at("the warm-up")
        x, y = (
            torch.from_numpy(tokens[0].copy()).to(self.device.torch)
            for tokens in self.make_batch(self.run.batch)
        )
        found = warm_up(self.forward, self.parameters, x, y, self.device, self.world)
        memory = f", {found.peak_bytes / 2**30:.1f} GiB" if found.peak_bytes else ""
        self.metrics.console.say(
            f"warm-up: {duration(found.compile_s)} to compile and settle, then "
            f"{found.pass_s * 1e3:.0f} ms a micro-batch{memory}"
        )

    def make_batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        self.unchanged.check()  # to read past the end of a file cut short would end the process
        x, y = self.batches.batch(number, self.split)
        self.unchanged.check()
        return x, y

    def examine(self, step: int) -> None:
        self.watch.at(f"the evaluation after step {step}")
        self.unchanged.check()
        self.validation = self.evaluator(step)
        self.unchanged.check()

    def examine_saved(self) -> None:
        """What the checkpoint gone on from had no time for, if it was saved to stop."""
        self.examine(self.run.step)
        if self.world.is_main:
            self.run.amend(examined=True, validation_loss=self.validation)

    def check_end(self, loss: float) -> None:
        """Raise `UserError` if the run ends with weights whose loss is not finite. `loss`: of the
        last step, which decides where there is no validation split."""
        last = loss if self.validation is None else self.validation
        if not math.isfinite(last):
            raise UserError(
                f"the run ends with a loss of {last}, so its last step was not saved: lower "
                "--optim.lr and start anew in another --out"
            )

    def save(self, step: int, batch: int, *, examined: bool) -> None:
        """Begin the checkpoint of `step`; it is written while training goes on."""
        self.watch.at(f"the checkpoint of step {step}")
        self.compare_ranks(step)
        replicas.check_finite(self.model, self.optimizer, self.world, step)
        validation = self.validation if examined else None
        self.saver.save(
            self.run.describe(step, batch, self.guard, examined=examined, validation=validation)
        )

    def stop(self, told: int, step: int, batch: int) -> NoReturn:
        """Save what is there, and end the run as the signal `told` asked."""
        self.save(step, batch, examined=False)
        self.saver.finish()
        raise Stopped(
            told, f"stopped by {signal.Signals(told).name} after step {step - 1}, and all of it is "
            "saved: the same command goes on",
        )  # fmt: skip

    def go_back(self, step: int, batch: int) -> int:
        """After too many refused steps: return to the checkpoint before them, with the data after
        them. Returns the step to go on with; the next batch is `batch`."""
        self.saver.close()  # a disk that failed is no reason to end: there are older ones
        self.world.barrier()
        refused = f"the {self.guard.refused} steps before step {step} were refused in a row"
        advice = "lower --optim.lr and start anew, or fork an earlier checkpoint"
        if not self.run.go_back(self.world, self.device.torch):
            raise UserError(f"{refused} and there is no checkpoint to go back to: {advice}")
        back = self.run.step
        self.returns[back] += 1
        if self.returns[back] > GIVE_UP_AFTER:
            raise UserError(f"{refused}, though the run went back to step {back} before: {advice}")
        restore(self.run, self.model, self.optimizer, self.guard)
        self.metrics.rewind(self.run.is_past)
        self.metrics.record("return", back, refused_at=step - 1, next_batch=batch)
        self.metrics.console.say(
            f"step {step - 1:>5} | {refused}: back to step {back}, with batch {batch} and on "
            f"(stepping over {self.run.batch} to {batch - 1})"
        )
        self.prefetcher.close()
        self.prefetch(batch)
        return back

    def compare_ranks(self, step: int) -> None:
        """Stop the run if a rank no longer has the weights of the others."""
        replicas.compare(self.model, self.optimizer, self.world, step)


def restore(run: Run, model: GPT2, optimizer: Optimizer, guard: Guard) -> None:
    """Copy weights, optimizer state and the guard's memory from the run's checkpoint, if any."""
    if run.checkpoint:
        run.checkpoint.restore_model(model)
        run.checkpoint.restore_optimizer(optimizer)
        guard.restore(run.checkpoint.description["guard"])
        run.checkpoint.model.clear()  # or its file stays open, though the checkpoint be removed


def start(
    recipe: Recipe, data: Path, out: Path, options: RunOptions, lock: storage.Lock
) -> Session:
    """Check everything a user can get wrong, then build a run's model, data and optimizer, fresh
    or as its newest checkpoint has them, and only then write to its folder."""
    world = distributed.place()
    console = Console(quiet=not world.is_main)
    manifest = shards.read_manifest(data)
    if world.is_main:
        lock.take(create=is_begun(out))  # before anything is read that another may change
    run = open_run(recipe, manifest, data, out, options, world.size)
    if run.threads:
        torch.set_num_threads(run.threads)
    device = get_device(options.device, run.precision, world.local_rank)
    life = distributed.connect(world, device.torch, options.timeout)
    watch = Watchdog(world, options.timeout, life)
    run.agree(world, device.torch)
    make_deterministic(device, on_gpu=run.deterministic)
    keep_freed_memory(device)
    unchanged = shards.Unchanged(data, manifest)  # from before the hashes are checked
    verify_data(data, manifest, world, console)
    batches, validation = open_data(run, data, manifest)
    tokenizer = get_tokenizer(manifest.tokenizer)
    wanted = {"hellaswag": options.hellaswag}
    work = evaluator.load_for_training(wanted, tokenizer, device, world, console.say)

    compute = choose_compute(device, run.recipe.batch.length, kernels=run.kernels)
    model = make_model(run, compute, device, world)
    optimizer = AdamW(model, run.recipe.optim)
    guard = Guard(run.recipe.spike)
    restore(run, model, optimizer, guard)
    recompute = run.recompute
    if recompute is None:
        recompute = must_recompute(model, batches.windows.T, device, world)
    model.use(dataclasses.replace(compute, recompute=recompute))
    micro = run.micro or choose_micro(model, batches.rows, batches.windows.T, device, world)
    split = Split.of(batches.rows, micro, world.rank, world.size)
    compiled, body = compile_model(model, run, device, console)
    forward = compiled if is_sharded(model) else data_parallel(compiled, world, device.torch)

    run.begin(model, device, split, compiled=compiled is not model, console=console, lock=lock)
    metrics = run.open_metrics(model, device, console, world)
    saver = run.open_saver(model, optimizer, metrics, world)
    tasks = pack(
        work, model.config.block_size, device, world, compiled=compiled is not model,
        sharded=is_sharded(model),
    )  # fmt: skip
    evaluate = Evaluator(
        model, compiled, body, run.recipe, validation, tasks, tokenizer, split.micro, device,
        world, metrics, console,
    )  # fmt: skip
    return Session(
        run, world, device, model, forward, optimizer, guard, batches, unchanged, split,
        metrics, saver, evaluate, watch,
    )  # fmt: skip


def make_model(run: Run, compute: Compute, device: Device, world: World) -> GPT2:
    """The model as it is initialised, the same on every rank: on the device, whole or sharded."""
    torch.manual_seed(run.recipe.seed)
    model = GPT2(run.recipe.model).use(compute)
    if not run.shard or world.size == 1:
        return model.to(device.torch)
    shard(model, device.torch, world)  # from the CPU: a GPU may not have room for all of it
    return model


def open_data(run: Run, data: Path, manifest: shards.Manifest) -> tuple[Batches, list]:
    """The training batches of a run and its validation shards."""
    b = run.recipe.batch
    tokens = shards.open_split(data, manifest, "train")
    windows = Windows(tokens, b.length, manifest.vocab_size, b.unit)
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


def make_deterministic(device: Device, *, on_gpu: bool = False) -> None:
    """On a CPU the same split gives the same bits. On a GPU this costs speed: the fastest attention
    and the tuning of compiled kernels are left out."""
    if device.torch.type == "cpu" or on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
        torch.use_deterministic_algorithms(True)
        # Nobody reads memory before writing it, and filling it costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compile_model(
    model: GPT2, run: Run, device: Device, console: Console
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The model and its body as they are called in training: compiled, if it can be done here.

    The compiled forms share their parameters with `model`, whose names stay clean.
    """
    reason = why_not_compile(device.torch) if run.compile else "as asked"
    if is_sharded(model):
        reason = reason or "the model is sharded"
    if reason:
        console.say(f"running without torch.compile: {reason}")
        return model, model.body
    # It warns of a CUDA toolkit without a GPU, which is nothing to a CPU's user.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    console.say(f"compiling the model (kept in {cache}): the first steps take longer")
    return (
        cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False)),
        torch.compile(model.body, fullgraph=True, dynamic=False),
    )
