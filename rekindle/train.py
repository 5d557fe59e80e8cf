"""Training: the step on one screen, and the loop around it.

Start reading at `train_step`. What happens now and then (validate, save, stop) is a plain
`if due(...)` in `train`; there are no callbacks. `session.start` builds what both work on.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from rekindle.evaluate.loss import Forward
from rekindle.observe.console import duration
from rekindle.optim import Optimizer
from rekindle.optim.gradients import clip_gradients, grad_norm, zero_gradients
from rekindle.optim.schedule import learning_rate
from rekindle.recipes import Recipe
from rekindle.run import Run, RunOptions
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World, gradient_sync, telling_of_lost_ranks
from rekindle.runtime.signals import Listener
from rekindle.session import start
from rekindle.storage import Lock

GO_BACK_AFTER = 10  # refused steps in a row
COMPARE_EVERY = 100  # steps between two comparisons of the ranks' weights


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, over all ranks. To read a number is to wait for the device."""

    on_device: Tensor  # (3,) float32: loss, norm of the gradient before clipping, 1 if skipped

    @cached_property
    def _numbers(self) -> list[float]:
        return self.on_device.tolist()

    @property
    def loss(self) -> float:
        return self._numbers[0]

    @property
    def norm(self) -> float:
        return self._numbers[1]

    @property
    def accepted(self) -> bool:
        """Whether the weights were updated."""
        return not self._numbers[2]


def train_step(
    forward: Forward,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    x: Tensor,  # (accumulation, micro, T) token ids of this rank
    y: Tensor,  # the same, one token on
    *,
    lr: float,
    clip: float,  # 0: the gradient as it is
    limit: float,  # largest loss with which the weights are updated
    device: Device,
    world: World,
) -> StepResult:
    """One update of the weights from one global batch; skipped as a whole if loss or gradient are
    not finite, or the loss is above `limit`. Nothing here waits for a GPU."""
    zero_gradients(parameters)
    loss = torch.zeros((), device=x.device)
    for i, (micro_x, micro_y) in enumerate(zip(x, y, strict=True)):
        with gradient_sync(forward, world, now=i == len(x) - 1):  # once a step, in the last pass
            with device.autocast():
                _, micro_loss = forward(micro_x, micro_y)
            assert micro_loss is not None
            (micro_loss / len(x)).backward()  # adds to the gradients of the micro-batches before
        loss += micro_loss.detach() / len(x)
    world.mean_(loss)

    norm = grad_norm(parameters)
    if clip:
        clip_gradients(parameters, clip, norm)
    skip = ~(loss.isfinite() & norm.isfinite()) | (loss > limit)
    optimizer.set_lr(lr)
    optimizer.step(skip)
    return StepResult(torch.stack([loss, norm, skip.float()]))


def due(step: int, every: int, last: int) -> bool:
    """Whether what comes `every` so many steps comes now; it always comes at the last one."""
    return step == last or (every > 0 and step % every == 0)


def train(recipe: Recipe, data: Path, out: Path, options: RunOptions) -> Run:
    """Train `recipe` on the shards in `data` into the run folder `out`, going on where it stopped.

    Raises `UserError` for whatever the user can mend, before anything is written, and `Stopped`
    once all is saved if a signal asked to stop.
    """
    started = time.perf_counter()
    with (
        telling_of_lost_ranks(),
        Lock(out) as lock,
        start(recipe, data, out, options, lock) as s,
        Listener() as signals,
    ):
        run, recipe, schedule = s.run, s.run.recipe, s.run.recipe.schedule
        step, batch = run.step, run.batch  # they differ once batches have been stepped over
        s.warm_up()
        if not run.examined and (step == 0 or due(step, recipe.eval_every, recipe.steps)):
            s.examine_saved()
        while step < recipe.steps:
            began, waited = time.perf_counter(), s.prefetcher.waited
            s.watch.at(f"the data of step {step}")
            x, y = s.prefetcher.next()
            lr = learning_rate(
                step, peak=recipe.optim.lr, warmup=schedule.warmup, steps=recipe.steps,
                final=schedule.final,
            )  # fmt: skip
            s.watch.at(f"step {step}")
            result = train_step(
                s.forward, s.parameters, s.optimizer, x, y, lr=lr, clip=recipe.grad_clip,
                limit=s.guard.limit(), device=s.device, world=s.world,
            )  # fmt: skip
            objection = s.guard.objection(result.loss, result.norm)
            s.metrics.step(
                step, loss=result.loss, lr=lr, norm=result.norm, objection=objection,
                seconds=time.perf_counter() - began, data_wait=s.prefetcher.waited - waited,
            )  # fmt: skip
            if started:
                took = duration(time.perf_counter() - started)
                s.metrics.console.say(f"first step done {took} after the start")
                started = 0.0
            step, batch = step + 1, batch + 1
            if s.guard.refused == GO_BACK_AFTER:
                step = s.go_back(step, batch)
                continue
            if due(step, COMPARE_EVERY, recipe.steps):
                s.compare_ranks(step)
            if told := s.world.max(signals.told, s.device.torch):
                s.stop(told, step, batch)
            if examined := due(step, recipe.eval_every, recipe.steps):
                s.examine(step)
            if step == recipe.steps:
                s.check_end(result.loss)
            trusted = not s.guard.refused or step == recipe.steps
            if due(step, recipe.checkpoint_every, recipe.steps) and trusted:
                s.save(step, batch, examined=examined)
        s.saver.finish()
    return s.run
