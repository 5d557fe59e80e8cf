"""Evaluation during training: selection of tasks, log records and console output."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
    """A task with given scores, whose items can be loaded from anywhere except the hub."""

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


def load(
    task: Any, where: str, device: Device, reported: list[str], world: Any = None
) -> list[Any]:
    return load_for_training(
        [(task, where)], ByteTokenizer(), device, world or World(), reported.append
    )


def test_which_tasks_a_training_run_evaluates(colours: Colours, cpu: Device) -> None:
    reported: list[str] = []
    assert load(colours, "file", cpu, reported) == [(colours, [ITEM] * 4)]
    assert load(colours, "none", GPU, reported) == []
    assert load(colours, "auto", cpu, reported) == []
    assert not reported
    assert load(colours, "auto", GPU, reported) == []  # training continues without the task
    assert reported == ["Colours is skipped: no network"]
    with pytest.raises(UserError, match="no network"):
        load(colours, "hub", cpu, reported)


@pytest.mark.parametrize(
    ("where", "fewest", "found"), [("two", 3, 3), ("two", 0, 0), ("none", 0, 0)]
)
def test_task_is_evaluated_on_all_ranks_or_on_none(
    colours: Colours, cpu: Device, where: str, fewest: int, found: int
) -> None:
    """Every rank takes part in the decision."""
    calls: list[str] = []

    def least(count: int, device: torch.device) -> int:
        calls.append("min")
        return fewest

    def agree(count: int, meaning: str, advice: str, device: torch.device) -> None:
        calls.append(f"{meaning} {advice}")

    reported: list[str] = []
    work = load(colours, where, cpu, reported, SimpleNamespace(min=least, agree=agree))
    assert sum(len(items) for _, items in work) == found
    assert calls[0] == "min"
    same = "Colours has the checksum give every host the same --colours"
    assert calls[1:] == ([same] if fewest else [])
    skipped = where == "two" and not fewest
    assert reported == (["Colours is skipped: another rank has no items"] if skipped else [])


def test_ranks_compare_more_than_the_number_of_items(
    monkeypatch: pytest.MonkeyPatch, colours: Colours, cpu: Device
) -> None:
    """Sums over ranks need the same candidates on every rank."""
    others = [Item([1], [[2], [3]], 1), Item([1, 1], [[2], [3]]), Item([1], [[2]])]
    others += [Item([1], [[2], [3, 3]])]
    checksums: list[int] = []
    world = SimpleNamespace(min=lambda count, _: count, agree=lambda n, *_: checksums.append(n))
    for item in [ITEM, *others, ITEM]:
        monkeypatch.setattr(colours, "load", lambda *_, item=item: [item] * 3)
        load(colours, "file", cpu, [], world)
    assert checksums[0] == checksums[-1]
    assert len(set(checksums)) == 5


def test_only_the_validation_loss_is_compiled(model: GPT2, colours: Task, cpu: Device) -> None:
    shapes: list[tuple[int, ...]] = []

    def compiled(x: Tensor, y: Tensor) -> tuple[None, None]:
        shapes.extend((tuple(x.shape), tuple(y.shape)))
        return None, None

    recipe: Any = SimpleNamespace(batch=SimpleNamespace(length=16))
    logger: Any = SimpleNamespace()
    tasks = pack([(colours, [ITEM] * 4)], model.config.block_size, cpu)

    def compile(forward: Any, validation: list[np.ndarray]) -> float:
        return Evaluator(
            model, forward, recipe, validation, tasks, ByteTokenizer(), 2, cpu, World(),
            logger, Console(stream=io.StringIO()),
        ).compile()  # fmt: skip

    shard = np.zeros(64, np.uint16)
    assert compile(model, [shard]) == 0.0
    assert compile(compiled, []) == 0.0
    assert not shapes
    assert compile(compiled, [shard]) > 0.0
    assert shapes == [(2, 16), (2, 16)]


def test_nothing_is_left_to_compile_for_the_first_evaluation(model: GPT2, cpu: Device) -> None:
    """Otherwise the compilation is counted as part of the validation."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    forward = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    batch = SimpleNamespace(length=16)
    recipe: Any = SimpleNamespace(batch=batch, eval_tokens=64, passage="")
    logger: Any = SimpleNamespace(record=lambda *_, **__: None)
    evaluate = Evaluator(
        model, forward, recipe, [np.zeros(64, np.uint16)], [], ByteTokenizer(), 2, cpu, World(),
        logger, Console(stream=io.StringIO()),
    )  # fmt: skip
    evaluate.compile()
    evaluate.validate(0)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_task_results_are_logged_and_printed(
    model: GPT2, colours: Task, cpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and the number of items, but no other count; the main metric comes first."""
    monkeypatch.setattr(evaluator.time, "perf_counter", lambda: 5.0)
    records: list[dict[str, Any]] = []
    screen = io.StringIO()
    recipe = replace(recipes.RECIPES["demo"], prompt="a b")
    logger: Any = SimpleNamespace(
        record=lambda kind, step, **values: records.append({"kind": kind, "step": step, **values})
    )
    tasks = pack([(colours, [ITEM] * 4)], model.config.block_size, cpu)
    evaluate = Evaluator(
        model, model, recipe, [], tasks, ByteTokenizer(), 2, cpu, World(), logger,
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
