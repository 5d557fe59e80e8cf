"""The interface of an evaluation task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rekindle.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """One question of a task, as tokens: a context and its candidate continuations.

    Every token of a candidate is scored, except one without a preceding token. If context and
    candidate together exceed the model's block size, the beginning is dropped.
    """

    context: list[int]
    candidates: list[list[int]]  # at least one, none empty; the number may differ per item
    label: int = 0  # index of the correct candidate


class Task(Protocol):
    """An evaluation task: where its items come from, and how losses become scores. To make one
    available to the commands, add a file to this folder and a line to `TASKS`."""

    name: str  # used for its log records, its results and its flag
    title: str  # display name
    metric: str  # the main one of `score`'s keys: a fraction of the items
    chance: float  # expected `metric` of random guessing
    needs_greedy: bool  # whether `score` uses `greedy`

    def load(self, where: str, tokenizer: "Tokenizer") -> list[Item]:
        """Read the items from a file, or from the hub if `where` is "hub". Raises `UserError` if
        that fails; for a malformed item, it names the row."""
        ...

    def score(
        self,
        items: Sequence[Item],
        sums: "Sequence[Tensor]",
        counts: "Sequence[Tensor]",
        greedy: "Sequence[Tensor] | None",
    ) -> dict[str, float]:
        """Metrics as floats, counts as ints; a key that starts with "acc" is a fraction of the
        items.

        Each argument holds one tensor per item, with one value per candidate, on the CPU: `sums`
        is the summed loss of the scored tokens in nats (float64, finite), `counts` the number of
        scored tokens (float64), `greedy` whether all of them were the model's first choice (bool;
        None unless `needs_greedy`).
        """
        ...
