"""A task from outside the package is passed as an object and scored, without registering it."""

import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rekindle.data.tokenizer import ByteTokenizer
from rekindle.evaluate.scoring import Losses, candidate_losses, evaluate, pack
from rekindle.evaluate.tasks import Item
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World
from tests.evaluate.conftest import tiny_model, work_on_ranks
from tests.extension.five_choices import FiveChoices

Plain = list[list[tuple[float, int, bool]]]
CPU = Device(torch.device("cpu"), "CPU", "fp32")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> GPT2:
    return tiny_model()


@torch.no_grad()
def plain_loop(model: GPT2, items: list[Item]) -> Plain:
    """Loss, number of scored tokens and greediness of each candidate, one text at a time."""
    found = []
    for item in items:
        found.append([])
        for candidate in item.candidates:
            text = torch.tensor((item.context + candidate)[-model.config.block_size :])
            count = min(len(candidate), len(text) - 1)
            logits, _ = model(text[None, :-1])
            assert logits is not None
            logits, targets = logits[0, -count:], text[-count:]
            padded = model.lm_head(model.transformer(text[None, :-1]))[0, -count:]
            loss = F.cross_entropy(padded, targets, reduction="sum").item()
            found[-1].append((loss, count, bool((logits.argmax(1) == targets).all())))
    return found


@pytest.fixture
def items(tmp_path: Path, model: GPT2) -> list[Item]:
    """Riddles with one to five answers; some are greedy continuations, some too long."""
    rng = random.Random(3)

    def text(least: int, most: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=rng.randint(least, most)))

    lines = ["|".join([text(1, 40), *(text(1, 20) for _ in range(n % 5 + 1))]) for n in range(20)]
    lines += ["x" * 250 + "|" + "|".join("a" * n for n in (3, 6, 7, 90, 255)), "|ab|cde"]
    file = tmp_path / "riddles.txt"
    file.write_text("\n".join(lines))
    task_items = FiveChoices().load(str(file), ByteTokenizer())
    return task_items + [likely(model, item) for item in task_items[:6]]


@torch.no_grad()
def likely(model: GPT2, item: Item) -> Item:
    """The item with the model's greedy continuation as its first candidate."""
    text = list(item.context)
    for _ in range(4):
        logits, _ = model(torch.tensor([text]))
        assert logits is not None
        text.append(int(logits[0, -1].argmax()))
    return Item(item.context, [text[len(item.context) :], *item.candidates[1:]])


def assert_same(losses: Losses, expected: Plain) -> None:
    assert losses.greedy is not None
    assert [len(each) for each in losses.sums] == [len(each) for each in expected]
    found = zip(torch.cat(list(losses.sums)), torch.cat(list(losses.counts)), strict=True)
    flat = [candidate for item in expected for candidate in item]
    assert [count for _, count in found] == [count for _, count, _ in flat]
    assert torch.cat(list(losses.greedy)).tolist() == [greedy for *_, greedy in flat]
    sums = torch.tensor([loss for loss, *_ in flat], dtype=torch.float64)
    torch.testing.assert_close(torch.cat(list(losses.sums)), sums, rtol=1e-5, atol=1e-5)


def score_by_hand(expected: Plain) -> dict[str, float]:
    means = [[loss / count for loss, count, _ in item] for item in expected]
    right = sum(each.index(min(each)) == 0 for each in means)
    return {
        "acc": right / len(expected),
        "greedy": sum(item[0][2] for item in expected) / len(expected),
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tokens_per_batch", [1, 2048], ids=["a row at a time", "together"])
def test_external_task_is_scored(
    model: GPT2, items: list[Item], ranks: int, tokens_per_batch: int
) -> None:
    expected = plain_loop(model, items)
    sizes = {len(item.candidates) for item in items}
    assert sizes == {1, 2, 3, 4, 5}

    def work(world: World) -> tuple[Losses, dict[str, float]]:
        (packed,) = pack(
            [(FiveChoices(), items)],
            model.config.block_size,
            CPU,
            world,
            tokens_per_batch=tokens_per_batch,
        )
        return candidate_losses(model, packed, CPU), evaluate(model, packed, CPU)

    by_hand = score_by_hand(expected)
    assert 0.2 < by_hand["greedy"] < by_hand["acc"] < 1
    for losses, scores in work_on_ranks(ranks, work):
        assert_same(losses, expected)
        assert scores == by_hand
