"""Training: one optimizer step (`train_step`) and the loop around it (`train`).

Start reading here, at `train_step`. Periodic work (evaluating, saving, stopping) is a plain
`if due(...)` in `train`; there are no callbacks. `trainer.build` creates the model, optimizer and
batches that a step needs; `start.train_run` opens the run folder and calls `train`.
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

ROLL_BACK_AFTER = 10  # consecutive skipped steps
COMPARE_EVERY = 100  # steps between checks that all ranks hold the same weights


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, over all ranks.

    They are copied to the host in the background. The first property that reads one waits for that
    copy, but not for the update of the weights.
    """

    numbers: Readback  # loss, grad norm before clipping, 1 if the step was skipped, stop signal
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
        """Whether the step left weights and optimizer state unchanged."""
        return bool(self._read[2])

    @property
    def stop_signal(self) -> int:
        """The number of a stop signal that any rank had received; 0 if there was none."""
        return int(self._read[3])


def train_step(
    forward: Forward,
    parameters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    x: Tensor,  # (accumulation, micro_batch, T) token ids of this rank
    y: Tensor,  # targets: x shifted by one token
    *,
    lr: float,
    grad_clip: float,  # maximum gradient norm; 0 disables clipping
    limit: float,  # skip the step if the loss is above this
    device: Device,
    world: World,
    stop_signal: Callable[[], int] = lambda: 0,  # number of a signal that this rank received
) -> StepResult:
    """Take one optimizer step on one global batch.

    Skips the update if the loss or the gradient norm is not finite, or if the loss is above
    `limit`. The decision is made on the device, so nothing here waits for a GPU.
    """
    zero_gradients(parameters)
    loss = torch.zeros((), device=x.device)
    for i, (micro_x, micro_y) in enumerate(zip(x, y, strict=True)):
        with gradient_sync(forward, world, now=i == len(x) - 1):  # all-reduce only in the last pass
            with device.autocast():
                _, micro_loss = forward(micro_x, micro_y)
            assert micro_loss is not None
            (micro_loss / len(x)).backward()  # accumulates gradients over the micro-batches
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
    """Whether periodic work is due after `step` steps: every `every` steps (0: never), and always
    after the `last` step."""
    return step == last or (every > 0 and step % every == 0)


def train(session: "Session") -> None:
    """Train to the recipe's last step, evaluating and saving checkpoints along the way.

    Raises `UserError` for a problem that the user can fix. If a signal requests a stop, saves a
    checkpoint and raises `Stopped`.
    """
    trainer, recipe, guard = session.trainer, session.trainer.recipe, session.trainer.guard
    session.warm_up()
    start = trainer.step
    # Evaluate the untrained weights, or a checkpoint that a stop signal left unevaluated.
    if not session.evaluated and (start == 0 or due(start, recipe.eval_every, recipe.steps)):
        session.evaluate_saved()
    while trainer.step < recipe.steps:
        start_time, waited = time.perf_counter(), trainer.data_wait_s
        result = trainer.train_step()
        session.log(result, time.perf_counter() - start_time, trainer.data_wait_s - waited)
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
        # No checkpoint after a skipped step: a rollback needs one from before the skipped steps.
        may_save = not guard.skipped or step == recipe.steps
        if due(step, recipe.checkpoint_every, recipe.steps) and may_save:
            session.save(evaluated=evaluated)
    session.saver.finish()
