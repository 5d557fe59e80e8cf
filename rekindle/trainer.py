"""Training without a folder: `build` makes all that one process holds while it trains."""

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
from rekindle.runtime.device import Device, choose_compute
from rekindle.runtime.distributed import World
from rekindle.runtime.guard import Guard
from rekindle.runtime.warm_up import WarmUp, warm_up
from rekindle.train import StepResult, train_step


@dataclass
class Trainer:
    """A model in training. Use it as a context: it reads batches in a thread.

    `train_step` takes the next step, `save` and `restore` write and read checkpoints; evaluation,
    logging and stopping are the caller's. Under torchrun every rank calls the same methods.
    """

    recipe: Recipe
    machine: Machine  # as decided: micro-batch size and recomputation are found
    device: Device
    world: World
    model: LanguageModel  # its parameters have the names that are saved
    model_class: type[LanguageModel]
    compiled: Forward  # the model as evaluation calls it: compiled, or the model itself
    compiled_body: Callable[..., Tensor] | None  # its body; None if it is not compiled
    forward: Forward  # the model as training calls it: in DDP if there are several ranks
    optimizer: Optimizer
    guard: Guard  # decides which steps are skipped
    batches: Batches
    partition: Partition
    check: Callable[[], None] = lambda: None  # called before and after a batch is read
    step: int = 0  # optimizer steps taken
    batch: int = 0  # number of the next batch; after a rollback it is ahead of `step`
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
        """Stop reading batches. The trainer can still be saved."""
        if self._prefetcher:
            self._prefetcher.close()
            self._waited_before += self._prefetcher.waited
            self._prefetcher = None

    def train_step(self) -> StepResult:
        """Take the next step of the recipe's schedule, on the next batch.

        Raises `UserError` if all steps are taken, the data cannot be read, or a rank is lost.
        """
        if self.step >= self.recipe.steps:
            raise UserError(f"all {self.recipe.steps} steps of the recipe are taken: give it more")
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
        )
        self.guard.observe(result.loss, result.grad_norm)
        self.step, self.batch = self.step + 1, self.batch + 1
        return result

    def warm_up(self) -> WarmUp:
        """Compile, and let DDP settle, on the first micro-batch of the next step; `train_step`
        does it if nobody has. Changes no weights."""
        self.at("the warm-up")
        self._start_reading()
        x, y = (
            torch.from_numpy(tokens[0].copy()).to(self.device.torch)
            for tokens in self._read_batch(self.batch)
        )
        self.warmed_up = warm_up(self.forward, self.parameters, x, y, self.device, self.world)
        return self.warmed_up

    def at(self, location: str) -> None:
        """Where this rank is, for a watchdog to report."""
        self.world.location.at(location)

    @property
    def data_wait_s(self) -> float:
        """Seconds that steps have waited for their batches."""
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
        self.check()  # reading past the end of a file cut short would end the process
        x, y = self.batches.batch(number, self.partition)
        self.check()
        return x, y

    def compare_ranks(self) -> None:
        """Raise `UserError` on every rank if one no longer has the weights of the others."""
        replicas.compare(self.model, self.optimizer, self.world, self.step)

    def describe(self) -> Description:
        """What a checkpoint of this moment says of itself; a run adds its data."""
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
        """Write a checkpoint of this moment into a new folder `folder`/step-NNNNNN, whole or not at
        all; return its path. It blocks: a run's `Saver` writes while training goes on.

        Raises `UserError` if weights or optimizer state are not finite.
        """
        replicas.check_finite(self.model, self.optimizer, self.world, self.step)
        return checkpoint.save(
            Path(folder), self.describe(), self.model, self.optimizer, self.world
        )

    def restore(self, saved: Checkpoint | Path | str, *, batch: int | None = None) -> None:
        """Return to a checkpoint: weights, optimizer state, guard and position. The next batch is
        the one after it, or `batch`: with another one, the batches in between are stepped over.

        Raises `UserError` if it is damaged, or holds another model or optimizer.
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
    """The learning rate of a recipe at the step with this number."""
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
    """A `Trainer` at step 0 of `recipe`, on the training tokens in `data`: arrays of token ids, of
    which each is a shard.

    `machine`: from `resolve`; by default the best of what is here. `ranks`: by default what
    torchrun says. `model`, `optimizer`: the classes of the recipe's configurations, if they are not
    in `MODELS` and `OPTIMIZERS`. `compute`: another way to compute than the machine's. `check` is
    called before and after a batch is read, and may raise.

    Sets threads, the precision of matmuls and deterministic algorithms for the whole process.
    Raises `UserError` if the recipe does not fit the data or the machine.
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
        torch.manual_seed(recipe.seed)  # on the CPU, so that every rank has the same weights
        module = (model or lookup.model_for(recipe.model))(recipe.model).use(compute)
    model_class = type(module)  # sharding gives it one of its own
    placement.move(module, machine, device, world)
    optim = (optimizer or lookup.optimizer_for(recipe.optim))(module, recipe.optim)
    machine = placement.fit(machine, module, compute, b.rows, b.length, device, world)
    assert machine.micro_batch
    partition = Partition.of(b.rows, machine.micro_batch, world.rank, world.size)
    compiled, body = placement.compile_model(module, machine)
    return Trainer(
        recipe=recipe,
        machine=machine,
        device=device,
        world=world,
        model=module,
        model_class=model_class,
        compiled=compiled,
        compiled_body=body,
        forward=placement.data_parallel(module, compiled, device, world),
        optimizer=optim,
        guard=Guard(recipe.spike),
        batches=batches,
        partition=partition,
        check=check,
    )
