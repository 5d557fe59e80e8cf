"""Scoring: packed items match one row at a time, on any number of ranks."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rekindle.trainer
from rekindle.data.tokenizer import ByteTokenizer
from rekindle.evaluate.evaluator import Evaluator
from rekindle.evaluate.scoring import Packed, candidate_losses, evaluate, pack
from rekindle.evaluate.tasks import Item
from rekindle.evaluate.tasks.hellaswag import HellaSwag, Question, tokenize
from rekindle.model.gpt2 import GPT2, Compute
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World

CPU = Device(torch.device("cpu"), "CPU", "fp32")
Plain = Callable[[GPT2, Question], tuple[list[float], list[float]]]


def packed(model: GPT2, questions: Sequence[Question], **how: Any) -> Packed:
    items = [tokenize(question, ByteTokenizer()) for question in questions]
    (made,) = pack([(HellaSwag(), items)], model.config.block_size, CPU, **how)
    return made


def losses_of(model: GPT2, made: Packed, **how: Any) -> tuple[Tensor, Tensor]:
    """Sum and mean of the losses of each ending, (Q, 4)."""
    found = candidate_losses(model, made, CPU, **how)
    sums, counts = torch.stack(list(found.sums)), torch.stack(list(found.counts))
    return sums, sums / counts.clamp(min=1)


def losses(model: GPT2, questions: Sequence[Question], **how: Any) -> tuple[Tensor, Tensor]:
    return losses_of(model, packed(model, questions, **how))


# The model has 256 positions.
LONG = [
    Question("x" * 200, ("a" * 55, "b" * 55, "c" * 9, "d" * 55), 0),  # just fits: 256 each
    Question("x" * 200, ("a" * 55, "b" * 56, "c" * 9, "d" * 55), 0),  # one token too many
    Question("abc " * 20, ("a" * 170, "b" * 170, "c" * 170, "d" * 170), 0),  # together 764
    Question("xyz " * 60, ("a", "bc" * 30, "de", "fg" * 5), 0),  # one of the four is too long
    Question("xyz " * 99, ("a", "bc" * 30, "de" * 80, "fg" * 5), 0),  # all are
    Question("xyz", ("a" * 254, "b" * 255, "c" * 256, "d" * 999), 0),  # endings alone are too long
    Question("xyz", ("a", "b", "c", "d" * 252), 0),
]
ODD = [
    Question("", ("one", "two", "three", "fourteen"), 0),  # nothing predicts the first token
    Question("a", ("", "", "b", "c"), 0),
    Question("one", ("same", "same", "same", "same"), 0),
]


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled's layout"])
@pytest.mark.parametrize("tokens_per_batch", [1, 700, 16_384], ids=["rows", "few", "many"])
def test_packed_losses_match_one_row_at_a_time(
    model: GPT2, asked: Any, plain: Plain, tokens_per_batch: int, compiled: bool, attention: str
) -> None:
    questions = [*asked.questions, *LONG, *ODD]
    expected = torch.tensor([plain(model, q) for q in questions], dtype=torch.float64)
    layout = {"compiled": compiled, "tokens_per_batch": tokens_per_batch}
    model.use(Compute(attention=attention))
    try:
        sums, means = losses(model, questions, **layout)
    finally:
        model.use(Compute())
    assert sums.dtype == means.dtype == torch.float64
    torch.testing.assert_close(sums, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means, expected[:, 1], rtol=1e-5, atol=1e-5)


def test_choices_match_one_question_at_a_time(model: GPT2, asked: Any) -> None:
    """With the reference's choices as labels, every question must be answered correctly."""
    both = (asked.by_sum, asked.by_mean)
    for labels in both:
        score = evaluate(model, packed(model, asked.labelled(labels)), CPU)
        expected = [sum(a == b for a, b in zip(labels, by, strict=True)) for by in both]
        assert [score["total"], score["correct"], score["correct_norm"]] == [40, *expected]
        assert 40 in expected
        assert min(expected) < 30


@pytest.mark.parametrize("changed", range(4))
def test_endings_do_not_attend_to_each_other(model: GPT2, changed: int) -> None:
    before = Question("a context ", ("first", "second ending", "third", "the fourth"), 0)
    endings = list(before.endings)
    endings[changed] = endings[changed].upper()
    after = replace(before, endings=tuple(endings))
    difference = (losses(model, [before])[0] - losses(model, [after])[0]).abs().squeeze()
    others = [i for i in range(4) if i != changed]
    assert difference[changed] > 0.1
    assert difference[others].max() < 1e-6


def test_context_is_computed_once_and_head_only_where_needed(model: GPT2, asked: Any) -> None:
    made = packed(model, asked.questions)
    rows, headed = [], []
    hooks = [
        model.transformer.register_forward_hook(lambda _, args, out: rows.append(len(args[0]))),
        model.lm_head.register_forward_hook(lambda _, args, out: headed.append(len(args[0]))),
    ]
    try:
        evaluate(model, made, CPU)
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(rows) == len(asked.questions)
    assert len(rows) == len(made.batches)
    tokens = [len(e.encode()) + 1 for q in asked.questions for e in q.endings]
    assert sum(headed) == sum(tokens)


def test_positions_stay_within_the_models_context(model: GPT2) -> None:
    batches = packed(model, [*LONG, *ODD]).batches
    assert max(int(batch.positions.max()) for batch in batches) == model.config.block_size - 1
    assert max(batch.idx.shape[1] for batch in batches) > model.config.block_size  # rows are longer


def test_padding_changes_nothing_and_stays_finite(model: GPT2, asked: Any) -> None:
    """Whatever padding contains; a softmax over no keys would be NaN."""
    made = packed(model, asked.questions, compiled=True, tokens_per_batch=1500)
    random = torch.Generator().manual_seed(1)
    soiled, padding = [], 0
    for batch in made.batches:
        idx = batch.idx.clone()
        real = torch.zeros(idx.shape, dtype=torch.bool)
        for i, row in enumerate(batch.segments):
            end = int(row.nonzero().max()) + 1 if row.any() else 0  # rows end with an ending
            real[i, :end] = True
        noise = torch.randint(257, idx.shape, generator=random)
        soiled.append(replace(batch, idx=torch.where(real, idx, noise)))
        padding += int((~real).sum())
    assert padding > 500
    hidden: list[Tensor] = []

    def body(idx: Tensor, **how: Tensor) -> Tensor:
        hidden.append(model.transformer(idx, **how))
        return hidden[-1]

    clean = losses_of(model, made)
    dirty = losses_of(model, replace(made, batches=soiled), body=body)
    assert all(bool(h.isfinite().all()) for h in hidden)
    torch.testing.assert_close(clean, dirty, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens_per_batch", [1, 1024, 16_384])
def test_compiled_model_gets_few_shapes_for_any_lengths(model: GPT2, tokens_per_batch: int) -> None:
    questions = [Question("x" * n, ("a", "bb", "ccc", "dddd"), 0) for n in range(1, 400, 3)]
    made = packed(model, questions, compiled=True, tokens_per_batch=tokens_per_batch)
    shapes = {batch.idx.shape for batch in made.batches}
    assert len(shapes) <= 7  # one less than torch.compile allows per function
    assert len(shapes) == len({T for _, T in shapes})
    assert all(max(1, tokens_per_batch // T) == B for B, T in shapes)


@pytest.mark.parametrize(("compiled", "most"), [(True, 1.15), (False, 1.04)])
def test_little_is_padded(model: GPT2, compiled: bool, most: float) -> None:
    """As in HellaSwag: many questions of similar length, and some of other lengths."""
    near, other = range(180, 250), range(30, 250, 4)
    questions = [Question("x" * n, ("a", "a", "a", "a"), 0) for n in [*near, *near, *near, *other]]
    batches = packed(model, questions, compiled=compiled, tokens_per_batch=2048).batches
    padded = sum(batch.idx.numel() for batch in batches)
    assert padded < most * sum(len(q.context) + 8 for q in questions)


@pytest.mark.parametrize("ranks", [2, 3, 7, 50])
def test_score_does_not_depend_on_the_number_of_ranks(
    model: GPT2, asked: Any, ranks: int,
    on_ranks: Callable[[int, Callable[[World], Any]], list[Any]],
) -> None:  # fmt: skip
    """Also with more ranks than questions."""
    questions = [*asked.labelled(asked.by_mean), *LONG]
    alone = evaluate(model, packed(model, questions), CPU)

    def work(world: World) -> tuple[dict[str, float], int]:
        share = packed(model, questions, world=world)
        owners = torch.cat([torch.zeros(0, dtype=torch.long), *(b.owners for b in share.batches)])
        return evaluate(model, share, CPU), len((owners // 4).unique())

    scores, shares = zip(*on_ranks(ranks, work), strict=True)
    assert list(scores) == [alone] * ranks
    assert alone["total"] == sum(shares) == 47
    assert max(shares) - min(shares) <= 1
    assert 40 <= alone["correct_norm"] < 47


def test_logits_are_float32_in_the_loss(model: GPT2, asked: Any) -> None:
    """With bf16 activations, logits are bf16; bf16 losses would have only two or three digits."""
    one_token = [Question(q.context, ("", "", "", ""), 0) for q in asked.questions]
    made = packed(model, one_token)
    model.use(Compute(dtype=torch.bfloat16))
    try:
        sums, _ = losses_of(model, made)
    finally:
        model.use(Compute())
    assert (sums == sums.bfloat16().double()).float().mean() < 0.1
    torch.testing.assert_close(sums, losses_of(model, made)[0], rtol=0.1, atol=0.1)


def test_training_tokenizes_once(
    tmp_path: Path, train: Callable[..., Any], records: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    texts: list[str] = []
    encode = ByteTokenizer.encode

    def counting(self: ByteTokenizer, text: str) -> list[int]:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", counting)
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"ctx": "A man", "endings": list("abcd"), "label": 1}))
    train(tmp_path / "run", "--steps", 8, "--hellaswag", file)
    assert [r["total"] for r in records(tmp_path / "run", "hellaswag")] == [1, 1, 1]
    assert texts.count("A man") == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_training_compiles_only_the_validation_loss(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    from rekindle import start as module

    built: list[Any] = []

    def build(*arguments: Any, **how: Any) -> Any:
        trainer = rekindle.trainer.build(*arguments, **how)
        if compiled:  # no compiler is needed
            trainer.machine = dataclasses.replace(trainer.machine, compile=True)
            trainer.compiled = trainer.model.forward
        built.append(trainer)
        return trainer

    def evaluator(**parts: Any) -> Evaluator:
        model = parts["model"]
        assert isinstance(model, GPT2)  # samples and scores use the model itself
        assert (parts["forward"] is not model) == compiled  # the loss uses the compiled form
        return Evaluator(**parts)

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "Evaluator", evaluator)
    train(tmp_path / "run", "--steps", 1)
    assert len(built) == 1


def test_text_too_long_is_cut_at_the_beginning(model: GPT2) -> None:
    """The part that is cut off does not matter; the rest does."""
    endings = ("ij" * 50, "kl" * 50, "mn" * 50, "op" * 50)
    kept = model.config.block_size - 101  # room beside an ending and its space
    tail = ("abcdefgh" * 30)[:kept]
    expected, _ = losses(model, [Question(tail, endings, 0)])
    for before in ("different ", "entirely different ", "z" * 500):
        longer, _ = losses(model, [Question(before + tail, endings, 0)])
        torch.testing.assert_close(longer, expected, rtol=1e-6, atol=1e-6)
    other, _ = losses(model, [Question(tail[:-1] + "!", endings, 0)])
    assert (other - expected).abs().min() > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
def test_progress_counts_the_ranks_own_share(
    model: GPT2,
    asked: Any,
    ranks: int,
    on_ranks: Callable[[int, Callable[[World], Any]], list[Any]],
) -> None:
    calls: list[list[tuple[int, float]]] = [[], []]

    def work(world: World) -> None:
        share = packed(model, [*asked.questions, *LONG], world=world)
        evaluate(model, share, CPU, progress=lambda *call: calls[world.rank].append(call))

    on_ranks(ranks, work)
    assert all(reported == sorted(reported) for reported in calls)
    last = [reported[-1] for reported in calls[:ranks]]
    shares = [188] if ranks == 1 else [96, 92]
    assert last == [(share, 1.0) for share in shares]


def test_all_tasks_share_the_shapes_of_a_compiled_model(model: GPT2) -> None:
    """torch.compile limits the graphs of a function across all tasks."""
    task = HellaSwag()
    work = [
        (task, [Item([1] * n, [[2], [3]]) for n in lengths])
        for lengths in (range(1, 120, 3), range(120, 250, 3), [5, 250])
    ]
    tasks = pack(work, model.config.block_size, CPU, compiled=True, tokens_per_batch=1)
    assert [len(made.items) for made in tasks] == [40, 44, 2]
    assert len({batch.idx.shape for made in tasks for batch in made.batches}) <= 7
