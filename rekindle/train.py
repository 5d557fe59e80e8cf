"""Training: the step on one screen, and the loop around it.

Start reading at `train_step`. What happens now and then (evaluate, save, stop) is a plain
`if due(...)` in `train`; there are no callbacks. `trainer.build` makes what the step works on, and
`session.train_run` opens the run's folder around the loop.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rekindle.model.compute import Forward
from rekindle.optim import Optimizer
from rekindle.optim.gradients import clip_gradients, grad_norm, zero_gradients
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World, gradient_sync
from rekindle.runtime.readback import Readback

if TYPE_CHECKING:
    from rekindle.session import Session

ROLL_BACK_AFTER = 10  # skipped steps in a row
COMPARE_EVERY = 100  # steps between two comparisons of the ranks' weights


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, over all ranks. Reading a number waits for the device, but not
    for the update of the weights."""

    numbers: Readback  # loss, norm of the gradient before clipping, 1 if skipped, stop signal
    lr: float

    @cached_property
    def _read(self) -> list[float]:
        return self.numbers.tolist()

    @property
    def loss(self) -> float:
        return self._read[0]

    @property
    def grad_norm(self) -> float:
        return self._read[1]

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were."""
        return bool(self._read[2])

    @property
    def stop_signal(self) -> int:
        """The largest number of a signal that any rank had received; 0: none."""
        return int(self._read[3])


def train_step(
    forward: Forward,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    x: Tensor,  # (accumulation, micro_batch, T) token ids of this rank
    y: Tensor,  # the same, one token on
    *,
    lr: float,
    grad_clip: float,  # 0: no clipping
    limit: float,  # largest loss with which the weights are updated
    device: Device,
    world: World,
    stop_signal: Callable[[], int] = lambda: 0,  # number of a signal this rank received
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
    stop = torch.full((), float(stop_signal()), device=x.device)
    world.max_(stop)

    norm = grad_norm(parameters)
    if grad_clip:
        clip_gradients(parameters, grad_clip, norm)
    skip = ~(loss.isfinite() & norm.isfinite()) | (loss > limit)
    numbers = Readback(torch.stack([loss, norm, skip.float(), stop]))  # while the GPU updates
    optimizer.set_lr(lr)
    optimizer.step(skip)
    return StepResult(numbers, lr)


def due(step: int, every: int, last: int) -> bool:
    """Whether what comes every `every` steps comes now; it always comes at the last one."""
    return step == last or (every > 0 and step % every == 0)


def train(session: "Session") -> None:
    """Train until the recipe's last step, evaluating and saving on the way.

    Raises `UserError` for what the user can mend, and `Stopped`, once all is saved, if a signal
    asked to stop.
    """
    trainer, recipe, guard = session.trainer, session.trainer.recipe, session.trainer.guard
    session.warm_up()
    start = trainer.step
    if not session.evaluated and (start == 0 or due(start, recipe.eval_every, recipe.steps)):
        session.evaluate_saved()
    while trainer.step < recipe.steps:
        began, waited = time.perf_counter(), trainer.data_wait_s
        result = trainer.train_step()
        session.log(result, time.perf_counter() - began, trainer.data_wait_s - waited)
        step = trainer.step
        if guard.skipped == ROLL_BACK_AFTER:
            session.roll_back()
            continue
        if due(step, COMPARE_EVERY, recipe.steps):
            trainer.compare_ranks()
        if signal := session.stop_requested(result):
            session.stop(signal)
        if evaluated := due(step, recipe.eval_every, recipe.steps):
            session.evaluate()
        if step == recipe.steps:
            session.check_end(result.loss)
        applied = not guard.skipped or step == recipe.steps
        if due(step, recipe.checkpoint_every, recipe.steps) and applied:
            session.save(evaluated=evaluated)
    session.saver.finish()
