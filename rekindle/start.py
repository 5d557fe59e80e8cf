"""Starts a run: checks everything, builds it, and only then writes to the run folder."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rekindle import machine as machines
from rekindle import recipes
from rekindle.checkpoint import Keep, Saver
from rekindle.data import shards
from rekindle.data.tokenizer import Tokenizer, get_tokenizer
from rekindle.evaluate import evaluator, tasks
from rekindle.evaluate.evaluator import Evaluator
from rekindle.evaluate.scoring import Packed, pack
from rekindle.evaluate.tasks import Item, Task
from rekindle.flags import flags_of
from rekindle.model import LanguageModel
from rekindle.observe.console import Console, counted
from rekindle.observe.json_lines import JsonLinesLogger
from rekindle.observe.metrics import Logger, Metrics
from rekindle.optim import Optimizer
from rekindle.plan import plan
from rekindle.recipes import Recipe
from rekindle.resume import open_run
from rekindle.run import Run, RunOptions, is_begun
from rekindle.runtime import device as devices
from rekindle.runtime import distributed
from rekindle.runtime.distributed import World, explaining_lost_ranks
from rekindle.runtime.sharding import is_sharded
from rekindle.runtime.signals import Listener
from rekindle.runtime.watchdog import Watchdog
from rekindle.session import Session
from rekindle.storage import Lock
from rekindle.train import train
from rekindle.trainer import Trainer, build, scheduled_rate

# Advice for when steps become much slower, by kind of device.
IF_SLOW = {
    "cpu": ": other work on this machine may be using its cores; if that lasts, stop with Ctrl-C "
    "and resume with fewer --threads",
    "cuda": ": other work may be using this GPU, or it may be too hot (see `nvidia-smi`)",
}


@dataclass(frozen=True)
class Parts:
    """Parts of a run that can only be given from Python, not by name on the command line."""

    model: type[LanguageModel] | None = None  # the class of the recipe's `model`
    optimizer: type[Optimizer] | None = None  # the class of the recipe's `optim`
    tokenizer: Tokenizer | None = None  # the one the data was prepared with
    tasks: Sequence[tuple[Task, str]] = ()  # each with the file of its items
    loggers: Sequence[Logger] = ()


def train_run(
    recipe: Recipe, data: Path, out: Path, options: RunOptions, parts: Parts | None = None
) -> Run:
    """Train `recipe` on the shards in `data`, in the run folder `out`; resume if it has a run.

    Raises `UserError` for a mistake of the user before anything is written, and `Stopped` after
    saving a checkpoint if a signal requested a stop.
    """
    began = time.perf_counter()
    with (
        explaining_lost_ranks(),
        Lock(out) as lock,
        start(recipe, data, out, options, lock, parts or Parts()) as session,
        Listener() as session.signals,
    ):
        session.began = began
        train(session)
    return session.run


@dataclass
class Opened:
    """A run that has been checked and built, before anything is written."""

    run: Run
    trainer: Trainer
    manifest: shards.Manifest
    unchanged: shards.Unchanged
    tokenizer: Tokenizer
    work: list[tuple[Task, list[Item]]]  # tasks to evaluate, with their items
    watch: Watchdog
    console: Console


def open_trainer(
    recipe: Recipe, data: Path, out: Path, options: RunOptions, lock: Lock | None, parts: Parts
) -> Opened:
    """Check everything a user can get wrong, and build the trainer, restored from the newest
    checkpoint if there is one. `lock` is taken if the run exists."""
    world = distributed.get_world()
    console = Console(quiet=not world.is_main)
    manifest = shards.read_manifest(data)
    if world.is_main and lock:
        lock.take(create=is_begun(out))  # before reading anything that another process may change
    run = open_run(recipe, manifest, data, out, options, parts.model, parts.optimizer)
    recipe = run.recipe
    machine = machines.resolve(options.machine, run.recorded, world, rows=recipe.batch.rows)
    device = machine.open(world.local_rank)
    life = distributed.connect(world, device.torch, options.timeout)
    watch = Watchdog(world, options.timeout, life)
    run.agree(machine, world, device.torch)
    unchanged = shards.Unchanged(data, manifest)  # from before the hashes are checked
    _verify_data(data, manifest, world, console)
    tokenizer = parts.tokenizer or get_tokenizer(manifest.tokenizer)
    wanted = [(tasks.get_task(n), options.tasks.get(n, "auto")) for n in tasks.TASKS]
    work = evaluator.load_for_training(
        [*wanted, *parts.tasks], tokenizer, device, world, console.print
    )
    trainer = build(
        recipe,
        shards.open_split(data, manifest, "train"),
        machine,
        world,
        model=run.model_class,
        optimizer=run.optimizer_class,
        check=unchanged.check,
    )
    if run.checkpoint:
        trainer.restore(run.checkpoint)
        run.checkpoint.model.clear()  # closes the file, so that the checkpoint can be removed later
    _introduce(run, trainer, console)
    for line in _warnings(run, tokenizer, world.size):
        console.print(f"note: {line}")
    return Opened(run, trainer, manifest, unchanged, tokenizer, work, watch, console)


def start(
    recipe: Recipe, data: Path, out: Path, options: RunOptions, lock: Lock, parts: Parts
) -> Session:
    """Open the run, then write to its folder."""
    opened = open_trainer(recipe, data, out, options, lock, parts)
    run, trainer, console = opened.run, opened.trainer, opened.console
    recipe, world, model = run.recipe, trainer.world, trainer.model
    if world.is_main:
        run.begin(lock, console)
    console.print(run.opening(world.size))
    metrics = _open_metrics(run, trainer, console, parts.loggers)
    keep = Keep(recipe.keep_checkpoints, recipe.keep_best, recipe.keep_every)
    saver = Saver(out / "checkpoints", keep, model, trainer.optimizer, metrics, world)
    sharded = is_sharded(model)
    packed = pack(opened.work, model.config.block_size, trainer.device, world, sharded=sharded)
    validation = shards.open_split(data, opened.manifest, "val")
    evaluate = _make_evaluator(trainer, validation, packed, opened.tokenizer, metrics)
    return Session(run, trainer, opened.unchanged, metrics, saver, evaluate, opened.watch, console)


def dry_run(
    recipe: Recipe, data: Path, out: Path, options: RunOptions, parts: Parts | None = None
) -> None:
    """Check and build everything as `train_run` does, print what it would do, and write nothing."""
    opened = open_trainer(recipe, data, out, options, None, parts or Parts())
    for line in plan(opened.run, opened.trainer, opened.manifest):
        opened.console.print(line)
    opened.trainer.close()
    opened.trainer.world.close()
    opened.watch.close()


def _make_evaluator(
    trainer: Trainer,
    validation: Sequence[np.ndarray],
    packed: Sequence[Packed],
    tokenizer: Tokenizer,
    metrics: Metrics,
) -> Evaluator:
    return Evaluator(
        model=trainer.model,
        forward=trainer.compiled,
        recipe=trainer.recipe,
        validation=validation,
        tasks=packed,
        tokenizer=tokenizer,
        micro_batch=trainer.partition.micro_batch,
        device=trainer.device,
        world=trainer.world,
        logger=metrics,
        console=metrics.console,
    )


def _introduce(run: Run, trainer: Trainer, console: Console) -> None:
    """Print the model and the device."""
    machine, device, p = trainer.machine, trainer.device, trainer.partition
    asked = run.options.machine
    if not machine.compile:
        why = "as when the run was started" if run.recorded and not run.recorded.compile else None
        why = "--no-compile was given" if asked.compile is False else why
        why = "the model is sharded" if is_sharded(trainer.model) else why
        console.print(f"not compiled: {devices.why_not_compile(device.torch) or why}")
    if run.recorded and (changed := machines.changes(run.recorded, machine, asked)):
        console.print(f"this machine differs from the one the run was started on: {changed}")
    m = run.recipe.model
    sizes = ", ".join(f"{flag.name} {flag.default}" for flag in flags_of(m))
    console.print(
        f"model: {trainer.model.parameter_count():,} parameters ({sizes}), vocabulary "
        f"{m.vocab_size:,}"
    )
    traits = {
        "compiled": machine.compile,
        "loss kernel": machine.kernels == "loss" and not machine.fp8_head,
        "all kernels": machine.kernels == "all",
        "FP8 head": machine.fp8_head,
        "recomputing": machine.recompute,
        "sharded": is_sharded(trainer.model),
    }
    console.print(
        f"device: {p.ranks} x {device.name}, {device.precision}"
        f"{''.join(f', {name}' for name, on in traits.items() if on)}; "
        f"{run.recipe.batch.tokens:,} tokens per step = {counted(p.micro_batch, 'row')} × "
        f"{run.recipe.batch.length:,} tokens × {counted(p.accumulation, 'accumulation step')} × "
        f"{counted(p.ranks, 'rank')}"
    )


def _warnings(run: Run, tokenizer: Tokenizer, world_size: int) -> list[str]:
    """Likely mistakes in this command, a line each."""
    recipe, found = run.recipe, recipes.warnings(run.recipe)
    tokens, room = len(tokenizer.encode(recipe.prompt)), recipe.model.block_size
    if tokens >= room:
        found.append(
            f"--prompt has {tokens} tokens, but the context length is {room}: no samples are logged"
        )
    if run.options.machine.shard and world_size == 1:
        found.append("--shard has no effect on a single rank")
    before = run.checkpoint.description.recipe.get("steps") if run.checkpoint else None
    if before and before != recipe.steps and not run.forked_from and run.step < recipe.steps:
        was, now = (
            scheduled_rate(dataclasses.replace(recipe, steps=steps), step)
            for steps, step in ((before, max(0, run.step - 1)), (recipe.steps, run.step))
        )
        found.append(
            f"--steps was {before} and is now {recipe.steps}, which changes the learning rate "
            f"schedule: {was:.2e} at step {run.step - 1}, {now:.2e} at step {run.step}"
        )
    return found


def _open_metrics(
    run: Run, trainer: Trainer, console: Console, loggers: Sequence[Logger]
) -> Metrics:
    """The run's metrics. Only the main rank has loggers."""
    main = trainer.world.is_main
    own = [JsonLinesLogger(run.open_log(), console.print)] if main else []
    peak = trainer.device.peak_flops
    metrics = Metrics(
        [*own, *loggers] if main else [],
        console,
        steps=run.recipe.steps,
        tokens_per_step=run.recipe.batch.tokens,
        flops_per_token=trainer.model.flops_per_token(run.recipe.batch.length),
        peak_flops=peak * trainer.world.size if peak else None,
        log_every=run.options.log_every,
        if_slow=IF_SLOW.get(trainer.device.torch.type, ""),
    )
    if main and run.checkpoint_is_unlogged():
        metrics.record("checkpoint", run.step)
    return metrics


def _verify_data(data: Path, manifest: shards.Manifest, world: World, console: Console) -> None:
    """Check the hash of every shard before the first step, in one process per machine."""
    began = time.perf_counter()
    if world.local_rank == 0:
        shards.verify(data, manifest)
    world.barrier()
    console.print(
        f"data: {manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation "
        f"tokens, every hash checked in {time.perf_counter() - began:.1f} s"
    )
