"""Evaluation in training: which tasks, and what the log and the console say of them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rekindle import recipes
from rekindle.data.tokenizer import ByteTokenizer, Tokenizer
from rekindle.errors import UserError
from rekindle.evaluate import evaluator
from rekindle.evaluate.evaluator import Evaluator, load_for_training
from rekindle.evaluate.scoring import pack
from rekindle.evaluate.tasks import Item, Task
from rekindle.model.gpt2 import GPT2
from rekindle.observe.console import Console
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

GPU = Device(torch.device("cuda"), "GPU", "autocast")
ITEM = Item([1], [[2], [3]])


@dataclass
class Colours:
    """A task whose scores are given, and whose items come from everywhere but the hub."""

    scores: dict[str, float]
    name = "colours"
    title = "Colours"
    metric = "acc"
    chance = 0.5
    needs_greedy = False

    def load(self, where: str, tokenizer: Tokenizer) -> list[Item]:
        if where == "hub":
            raise UserError("no network")
        return [ITEM] * len(where)

    def score(self, items: Sequence[Item], *_: Any) -> dict[str, float]:
        return self.scores


@pytest.fixture
def colours() -> Colours:
    return Colours({"total": 4, "perplexity": 7.25, "correct": 3, "acc": 0.75})


def load(task: Any, where: str, device: Device, said: list[str], world: Any = None) -> list[Any]:
    return load_for_training(
        [(task, where)], ByteTokenizer(), device, world or World(), said.append
    )


def test_which_tasks_a_training_run_evaluates(colours: Colours, cpu: Device) -> None:
    said: list[str] = []
    assert load(colours, "file", cpu, said) == [(colours, [ITEM] * 4)]
    assert load(colours, "none", GPU, said) == []
    assert load(colours, "auto", cpu, said) == []
    assert not said
    assert load(colours, "auto", GPU, said) == []  # the training does without
    assert said == ["Colours is skipped: no network"]
    with pytest.raises(UserError, match="no network"):
        load(colours, "hub", cpu, said)


@pytest.mark.parametrize(
    ("where", "fewest", "found"), [("two", 3, 3), ("two", 0, 0), ("none", 0, 0)]
)
def test_a_task_is_evaluated_on_all_ranks_or_on_none(
    colours: Colours, cpu: Device, where: str, fewest: int, found: int
) -> None:
    """And every rank takes part in finding out."""
    calls: list[str] = []

    def least(count: int, device: torch.device) -> int:
        calls.append("min")
        return fewest

    def agree(count: int, meaning: str, advice: str, device: torch.device) -> None:
        calls.append(f"{meaning} {advice}")

    said: list[str] = []
    work = load(colours, where, cpu, said, SimpleNamespace(min=least, agree=agree))
    assert sum(len(items) for _, items in work) == found
    assert calls[0] == "min"
    same = "Colours has the checksum give every host the same --colours"
    assert calls[1:] == ([same] if fewest else [])
    left_out = where == "two" and not fewest
    assert said == (["Colours is skipped: another rank has no items"] if left_out else [])


def test_ranks_compare_more_than_the_number_of_items(
    monkeypatch: pytest.MonkeyPatch, colours: Colours, cpu: Device
) -> None:
    """A sum over ranks needs the same candidates everywhere."""
    others = [Item([1], [[2], [3]], 1), Item([1, 1], [[2], [3]]), Item([1], [[2]])]
    others += [Item([1], [[2], [3, 3]])]
    checksums: list[int] = []
    world = SimpleNamespace(min=lambda count, _: count, agree=lambda n, *_: checksums.append(n))
    for item in [ITEM, *others, ITEM]:
        monkeypatch.setattr(colours, "load", lambda *_, item=item: [item] * 3)
        load(colours, "file", cpu, [], world)
    assert checksums[0] == checksums[-1]
    assert len(set(checksums)) == 5


def test_what_is_logged_and_said_of_a_task(
    model: GPT2, colours: Task, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and how many items there are, but no other count; the task's own metric leads."""
    monkeypatch.setattr(evaluator.time, "perf_counter", lambda: 5.0)
    records: list[dict[str, Any]] = []
    screen = io.StringIO()
    recipe = replace(recipes.RECIPES["demo"], prompt="a b")
    logger: Any = SimpleNamespace(
        record=lambda kind, step, **values: records.append({"kind": kind, "step": step, **values})
    )
    tasks = pack([(colours, [ITEM] * 4)], model.config.block_size, cpu)
    evaluate = Evaluator(
        model, model, None, recipe, [], tasks, ByteTokenizer(), 2, cpu, World(), logger,
        Console(stream=screen),
    )  # fmt: skip
    assert evaluate(0) is None
    expected = {"kind": "colours", "step": 0, "acc": 0.75, "perplexity": 7.25, "total": 4}
    assert records == [{**expected, "seconds": 0.0}]
    line = "step     0 | Colours acc 0.7500, perplexity 7.2500 (3/4, 0.0 s)\n"
    assert screen.getvalue() == line
    assert evaluate(7) is None
    assert [record["kind"] for record in records] == ["colours", "colours", "samples"]
    assert all(text.startswith("a b") for text in records[-1]["texts"])
