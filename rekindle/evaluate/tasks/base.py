"""The contract of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rekindle.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Item:
    """One question of a task, as tokens: a context, and candidates that may continue it.

    Every token of a candidate is scored, except one that nothing precedes. Where context and
    candidate are longer than the model's context, their beginning is dropped.
    """

    context: list[int]
    candidates: list[list[int]]  # at least one, none empty; items may differ in how many
    label: int = 0  # index of the right candidate


class Task(Protocol):
    """An evaluation: what it reads, and how it turns losses into scores. One file in this folder,
    and one line in `TASKS` for the commands to know it."""

    name: str  # of its records in the log, its results and its flag
    title: str  # as people write it
    metric: str  # the one of `score`'s keys that counts: a share of the items
    chance: float  # value of `metric` for a model that guesses
    needs_greedy: bool  # whether `score` looks at `greedy`

    def load(self, where: str, tokenizer: "Tokenizer") -> list[Item]:
        """Read the items from a file, or from the hub if `where` is "hub". Raises `UserError` if
        that cannot be done, naming the row of a malformed item."""
        ...

    def score(
        self,
        items: Sequence[Item],
        sums: "Sequence[Tensor]",
        counts: "Sequence[Tensor]",
        greedy: "Sequence[Tensor] | None",
    ) -> dict[str, float]:
        """Metrics as floats, counts as ints; a key that starts with "acc" is a share of the items.

        For each item a tensor with one value per candidate, on the CPU: `sums` has the sum of its
        tokens' losses in nats (float64, finite), `counts` how many tokens were scored (float64),
        `greedy` whether each of them was the model's first choice (bool; None unless
        `needs_greedy`).
        """
        ...
