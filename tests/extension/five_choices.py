"""A task written outside the package: riddles with up to five answers, from a text file.

A line is `context|answer|answer|...`, with the correct answer first. `acc` is the fraction of
riddles whose correct answer has the lowest loss per token, `greedy` the fraction whose correct
answer is the model's greedy continuation.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rekindle.data.tokenizer import Tokenizer
from rekindle.errors import UserError
from rekindle.evaluate.tasks import Item


class FiveChoices:
    """Riddles may differ in the number of answers."""

    name = "five_choices"
    title = "Five choices"
    metric = "acc"
    chance = 0.2
    needs_greedy = True

    def load(self, where: str, tokenizer: Tokenizer) -> list[Item]:
        items = []
        for number, line in enumerate(Path(where).read_text(encoding="utf-8").splitlines(), 1):
            context, *answers = line.split("|")
            if not 1 <= len(answers) <= 5 or not all(answers):
                raise UserError(f"{where}, line {number}: not a context and up to five answers")
            items.append(Item(tokenizer.encode(context), [tokenizer.encode(a) for a in answers]))
        return items

    def score(
        self,
        items: Sequence[Item],
        sums: Sequence[Tensor],
        counts: Sequence[Tensor],
        greedy: Sequence[Tensor] | None,
    ) -> dict[str, float]:
        assert greedy is not None
        means = [total / count for total, count in zip(sums, counts, strict=True)]
        right = [int(m.argmin()) == item.label for m, item in zip(means, items, strict=True)]
        greedily = [bool(g[item.label]) for g, item in zip(greedy, items, strict=True)]
        return {"acc": sum(right) / len(items), "greedy": sum(greedily) / len(items)}
