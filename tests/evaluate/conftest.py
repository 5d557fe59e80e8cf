"""A model with distinct losses, questions for it, and ranks that are threads."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from rekindle.data.tokenizer import ByteTokenizer
from rekindle.evaluate.tasks.hellaswag import Question
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import GPT2Config
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # fastest for tiny models; tests/conftest.py restores the setting


@pytest.fixture(scope="session")
def cpu() -> Device:
    return Device(torch.device("cpu"), "CPU", "fp32")


def tiny_model() -> GPT2:
    """Two layers, a padded vocabulary, and weights so large that no two losses are similar."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, block_size=256, vocab_size=257, padded_vocab_size=384
    )
    model = GPT2(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    return model


@pytest.fixture(scope="session")
def model() -> GPT2:
    return tiny_model()


def plain_losses(model: GPT2, question: Question) -> tuple[list[float], list[float]]:
    """Sum and mean of each ending's losses, one question at a time, like the lecture's script.

    Differences: the padded logits, which our model does not return, are computed by hand, and texts
    longer than the model's context are cut at the beginning.
    """
    tokenizer = ByteTokenizer()
    context = tokenizer.encode(question.context)
    endings = [tokenizer.encode(" " + ending) for ending in question.endings]
    rows = [(context + ending)[-model.config.block_size :] for ending in endings]
    tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros(tokens.shape)
    for i, (row, ending) in enumerate(zip(rows, endings, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, max(0, len(row) - len(ending)) : len(row)] = 1
    with torch.no_grad():
        logits = model.lm_head(model.transformer(tokens))
    shift_logits = logits[:, :-1].contiguous()
    shift_tokens = tokens[:, 1:].contiguous()
    losses = torch.nn.functional.cross_entropy(
        shift_logits.flatten(0, 1), shift_tokens.flatten(), reduction="none"
    ).view(4, -1)
    shift_mask = mask[:, 1:].contiguous()
    sums = (losses * shift_mask).sum(1)
    return sums.tolist(), (sums / shift_mask.sum(1)).tolist()


@pytest.fixture
def plain() -> Callable[[GPT2, Question], tuple[list[float], list[float]]]:
    """The reference: `sums, means = plain(model, question)`."""
    return plain_losses


@dataclass(frozen=True)
class Asked:
    """Questions of different lengths, and the ending that the plain reference picks for each."""

    questions: list[Question]
    by_sum: list[int]
    by_mean: list[int]

    def labelled(self, labels: list[int]) -> list[Question]:
        return [replace(q, label=x) for q, x in zip(self.questions, labels, strict=True)]


@pytest.fixture(scope="session")
def asked(model: GPT2) -> Asked:
    """40 questions whose endings differ in length, so that sum and mean pick different ones."""
    torch.set_num_threads(1)
    rng = random.Random(5)

    def words(least: int, most: int) -> str:
        letters = rng.choices("abcdefghijklmnop      éü", k=rng.randint(least, most))
        return "".join(letters)

    questions = [
        Question(words(1, rng.choice([20, 150])), tuple(words(1, 60) for _ in range(4)), 0)
        for _ in range(40)
    ]
    by_sum, by_mean = [], []
    for question in questions:
        for losses, chosen in zip(plain_losses(model, question), (by_sum, by_mean), strict=True):
            first, second = sorted(losses)[:2]
            assert second - first > 1e-4  # rounding cannot change the choice
            chosen.append(losses.index(first))
    assert sum(a != b for a, b in zip(by_sum, by_mean, strict=True)) > 10
    return Asked(questions, by_sum, by_mean)


class Meeting:
    """All-reduce for ranks that are threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._given: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def abort(self) -> None:
        self._barrier.abort()

    def sum_(self, rank: int, tensors: tuple[torch.Tensor, ...]) -> None:
        self._given[rank] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        for tensor, *parts in zip(tensors, *self._given, strict=True):
            tensor.copy_(torch.stack(parts).sum(0))
        self._barrier.wait()


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread of this process, instead of a process with gloo."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum_(self, *tensors: torch.Tensor) -> None:
        self.meeting.sum_(self.rank, tensors)


def work_on_ranks(size: int, work: Callable[[World], Any]) -> list[Any]:
    """`work(world)` on each of `size` ranks at once; returns what each returned."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def rank(number: int) -> None:
        try:
            results[number] = work(ThreadWorld(number, size, number, meeting=meeting))
        except BaseException:
            meeting.abort()  # so that no rank waits for one that failed
            raise

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def on_ranks() -> Callable[[int, Callable[[World], Any]], list[Any]]:
    return work_on_ranks
