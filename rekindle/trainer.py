"""Training from Python, without a run folder: `build` returns a `Trainer`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rekindle import __version__, checkpoint, lookup, placement, recipes
from rekindle.checkpoint import Checkpoint, Description
from rekindle.data.batches import Batches, Partition, Prefetcher, Windows
from rekindle.errors import UserError
from rekindle.machine import Machine, resolve
from rekindle.model import LanguageModel
from rekindle.model.compute import Compute, Forward
from rekindle.optim import Optimizer
from rekindle.optim.schedule import learning_rate
from rekindle.recipes import Recipe
from rekindle.runtime import distributed, replicas
from rekindle.runtime.compiling import repair_cache
from rekindle.runtime.device import Device, choose_compute
from rekindle.runtime.distributed import World
from rekindle.runtime.guard import Guard
from rekindle.runtime.warm_up import WarmUp, warm_up
from rekindle.train import StepResult, train_step


@dataclass
class Trainer:
    """A model with its optimizer and data. Use it as a context manager: a thread prefetches
    batches.

    `train_step` takes the next step; `save` and `restore` write and read checkpoints. The caller
    evaluates, logs and decides when to stop. Under torchrun, every rank must call the same methods.
    """

    recipe: Recipe
    machine: Machine  # final: micro-batch size and recomputation are decided
    device: Device
    world: World
    model: LanguageModel  # not wrapped, so its parameter names are those in a checkpoint
    model_class: type[LanguageModel]
    compiled: Forward  # what evaluation calls: the compiled model, or the model itself
    forward: Forward  # what training calls: `compiled`, wrapped in DDP if there are several ranks
    optimizer: Optimizer
    guard: Guard  # decides which steps to skip
    batches: Batches
    partition: Partition  # this rank's part of each batch
    check: Callable[[], None] = lambda: None  # called before and after each read of the data
    stop_signal: Callable[[], int] = lambda: 0  # number of this rank's stop signal; 0: none
    step: int = 0  # optimizer steps taken
    batch: int = 0  # index of the next batch; ahead of `step` after a rollback
    warmed_up: WarmUp | None = None
    _prefetcher: Prefetcher | None = field(default=None, repr=False)
    _waited_before: float = field(default=0.0, repr=False)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop prefetching batches. The trainer can still be saved."""
        if self._prefetcher:
            self._prefetcher.close()
            self._waited_before += self._prefetcher.waited
            self._prefetcher = None

    def train_step(self) -> StepResult:
        """Take the next step of the recipe's schedule on the next batch.

        Raises `UserError` if no steps are left, the data cannot be read, or a rank is lost.
        """
        if self.step >= self.recipe.steps:
            raise UserError(
                f"all {self.recipe.steps} steps of the recipe are done: use a recipe with more"
            )
        if not self.warmed_up:
            self.warm_up()
        self.at(f"the data of step {self.step}")
        x, y = self._next_batch()
        lr = scheduled_rate(self.recipe, self.step)
        self.at(f"step {self.step}")
        result = train_step(
            self.forward,
            self.parameters,
            self.optimizer,
            x,
            y,
            lr=lr,
            grad_clip=self.recipe.grad_clip,
            limit=self.guard.limit(),
            device=self.device,
            world=self.world,
            stop_signal=self.stop_signal,
        )
        self.guard.observe(result.loss, result.grad_norm)
        self.step, self.batch = self.step + 1, self.batch + 1
        return result

    def warm_up(self) -> WarmUp:
        """Compile the model and let DDP build its buckets, using the first micro-batch of the next
        step. Changes no weights. `train_step` calls this if the caller has not."""
        self.at("the warm-up")
        self._start_reading()
        x, y = (
            torch.from_numpy(tokens[0].copy()).to(self.device.torch)
            for tokens in self._read_batch(self.batch)
        )
        repair_cache()
        self.warmed_up = warm_up(self.forward, self.parameters, x, y, self.device, self.world)
        return self.warmed_up

    def at(self, location: str) -> None:
        """Record where this rank is, for the watchdog to report."""
        self.world.location.at(location)

    @property
    def data_wait_s(self) -> float:
        """Total seconds that training steps have waited for data."""
        return self._waited_before + (self._prefetcher.waited if self._prefetcher else 0.0)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step on the device: (accumulation, micro_batch, T)."""
        return self._start_reading().next()

    def _start_reading(self) -> Prefetcher:
        if self._prefetcher is None:
            last = self.batch + self.recipe.steps - self.step
            self._prefetcher = Prefetcher(self._read_batch, self.batch, last, self.device.torch)
        return self._prefetcher

    def _read_batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        self.check()  # reading past the end of a truncated memory-mapped file kills the process
        x, y = self.batches.batch(number, self.partition)
        self.check()
        return x, y

    def compare_ranks(self) -> None:
        """Raise `UserError` on every rank if the ranks' weights or optimizer states differ."""
        replicas.compare(self.model, self.optimizer, self.world, self.step)

    def describe(self) -> Description:
        """The description of a checkpoint taken now; a run adds its data and tokenizer."""
        return Description(
            step=self.step,
            recipe=recipes.flatten(self.recipe),
            model=dataclasses.asdict(self.model.config),
            model_class=lookup.name_of(self.model_class, lookup.models()),
            optimizer_class=lookup.name_of(type(self.optimizer), lookup.optimizers()),
            data_position={"windows": self.batch * self.recipe.batch.rows},
            guard=self.guard.state(),
            machine=self.machine,
            ranks=self.world.size,
            versions={"rekindle": __version__, "torch": torch.__version__},
        )

    def save(self, folder: Path | str) -> Path:
        """Write a checkpoint to a new folder, `folder`/step-NNNNNN, and return its path.

        The write is atomic and blocks until it is done; in a run, a `Saver` writes in the
        background instead. Raises `UserError` if a weight or the optimizer state is not finite.
        """
        replicas.check_finite(self.model, self.optimizer, self.world, self.step)
        return checkpoint.save(
            Path(folder), self.describe(), self.model, self.optimizer, self.world
        )

    def restore(self, saved: Checkpoint | Path | str, *, batch: int | None = None) -> None:
        """Load weights, optimizer state, guard and position from a checkpoint.

        Training continues with the batch after the checkpoint, or with batch number `batch`: a
        rollback skips the batches in between. Raises `UserError` if the checkpoint is damaged or
        belongs to a different model or optimizer.
        """
        self.close()
        if not isinstance(saved, Checkpoint):
            saved = checkpoint.load(checkpoint.find(Path(saved)), self.model_class)
        saved.check_same(self.model.config, self.model_class, type(self.optimizer))
        saved.restore_model(self.model)
        saved.restore_optimizer(self.optimizer)
        self.guard.restore(saved.description.guard)
        self.step = saved.step
        next_batch = saved.tokens_read // self.recipe.batch.tokens
        self.batch = next_batch if batch is None else batch


def scheduled_rate(recipe: Recipe, step: int) -> float:
    """The recipe's learning rate at `step`, counted from 0."""
    schedule = recipe.schedule
    return learning_rate(
        step,
        peak=recipe.optim.lr,
        warmup=schedule.warmup,
        steps=recipe.steps,
        final=schedule.final,
        cooldown=schedule.cooldown if schedule.kind == "linear" else None,
    )


def build(
    recipe: Recipe,
    data: Sequence[np.ndarray],
    machine: Machine | None = None,
    ranks: World | None = None,
    *,
    model: Callable[[Any], LanguageModel] | None = None,
    optimizer: Callable[[Any, Any], Optimizer] | None = None,
    compute: Compute | None = None,
    check: Callable[[], None] = lambda: None,
) -> Trainer:
    """A `Trainer` at step 0 of `recipe`.

    - `recipe`: its model needs the vocabulary of the data, padded: see `recipes.with_vocabulary`.
    - `data`: the training tokens, one 1-D array of token ids per shard.
    - `machine`: the result of `resolve`; by default the best available device.
    - `ranks`: by default, as set by torchrun.
    - `model`, `optimizer`: classes, if the recipe's are not in `MODELS` and `OPTIMIZERS`.
    - `compute`: overrides how the model computes; by default it follows from `machine`.
    - `check`: called before and after each read of the data; may raise.

    Sets the number of threads, the matmul precision and deterministic algorithms for the whole
    process. Raises `UserError` if the recipe does not suit the data or the machine.
    """
    recipes.check(recipe)
    world = ranks or distributed.get_world()
    machine = machine or resolve(world=world, rows=recipe.batch.rows)
    device = machine.open(world.local_rank)
    distributed.connect(world, device.torch)
    b = recipe.batch
    windows = Windows(data, b.length, recipe.model.vocab_size, b.unit)
    batches = Batches(windows, b.rows, recipe.seed, b.order)
    compute = compute or choose_compute(
        device, b.length, kernels=machine.kernels, fp8_head=machine.fp8_head
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # initialized on the CPU: the same weights on every rank
        module = (model or lookup.model_for(recipe.model))(recipe.model).use(compute)
    model_class = type(module)  # before sharding, which replaces the class
    placement.move(module, machine, device, world)
    optim = (optimizer or lookup.optimizer_for(recipe.optim))(module, recipe.optim)
    machine = placement.choose_memory_use(machine, module, compute, b.rows, b.length, device, world)
    assert machine.micro_batch
    partition = Partition.of(b.rows, machine.micro_batch, world.rank, world.size)
    compiled = placement.compile_model(module, machine)
    return Trainer(
        recipe=recipe,
        machine=machine,
        device=device,
        world=world,
        model=module,
        model_class=model_class,
        compiled=compiled,
        forward=placement.data_parallel(module, compiled, device, world),
        optimizer=optim,
        guard=Guard(recipe.spike),
        batches=batches,
        partition=partition,
        check=check,
    )
