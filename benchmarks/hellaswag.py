"""HellaSwag with the context computed once per question, compared with the lecture's evaluation.

    python -m benchmarks.hellaswag --file FILE [--rows N] [--out FILE]

Scores the same N questions in three ways, in turn, with GPT-2 124M (random weights, float32, CPU),
and checks that the losses agree. Tokenizing is not timed, because it happens once per run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import environment, write_result
from rekindle.data.tokenizer import get_tokenizer
from rekindle.evaluate.scoring import CPU_TOKENS, candidate_losses, pack
from rekindle.evaluate.tasks.hellaswag import HellaSwag, Question, read_questions, tokenize
from rekindle.model.gpt2 import GPT2
from rekindle.model.gpt2_config import SIZES
from rekindle.runtime.device import Device, choose_compute

RESULT = Path(__file__).parent / "results" / "hellaswag-cpu.json"
Texts = tuple[list[int], list[list[int]]]  # a context and its four endings, as tokens


def lecture(model: GPT2, questions: list[Texts]) -> Tensor:
    """A reimplementation of the lecture's hellaswag.py: one question at a time, four rows padded to
    the longest, logits at every position. Returns the summed loss of each ending, (Q, 4)."""
    sums = []
    for context, endings in questions:
        tokens, mask = padded([(context, ending) for ending in endings])
        logits = model(tokens)[0]  # (4, T, V)
        shifted = logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(shifted, tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums.append((losses * mask[:, 1:]).sum(1))
    return torch.stack(sums)


def row_by_row(model: GPT2, questions: list[Texts]) -> Tensor:
    """A row for each ending, in batches of similar length; logits for the endings only. (Q, 4)."""
    rows = [(context, ending) for context, endings in questions for ending in endings]
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n][0]) - len(rows[n][1]))
    sums = torch.zeros(len(rows))
    while order:
        height = max(1, CPU_TOKENS // sum(map(len, rows[order[0]])))
        chosen, order = order[:height], order[height:]
        tokens, mask = padded([rows[n] for n in chosen])
        row, column = mask[:, 1:].nonzero(as_tuple=True)
        logits = model.lm_head(model.transformer(tokens)[row, column])
        losses = F.cross_entropy(logits, tokens[row, column + 1], reduction="none")
        sums.index_add_(0, torch.tensor(chosen)[row], losses)
    return sums.view(-1, 4)


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), and a mask (B, T) that is true on the endings."""
    T = max(len(context) + len(ending) for context, ending in rows)
    tokens, mask = torch.zeros(len(rows), T, dtype=torch.long), torch.zeros(len(rows), T) > 0
    for i, (context, ending) in enumerate(rows):
        end = len(context) + len(ending)
        tokens[i, :end] = torch.tensor(context + ending)
        mask[i, len(context) : end] = True
    return tokens, mask


def sample(questions: list[Question], count: int) -> list[Question]:
    """`count` questions, spread evenly over the set sorted by length."""
    ordered = sorted(questions, key=lambda q: len(q.context) + sum(map(len, q.endings)))
    count = min(count, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


@torch.no_grad()
def compare(questions: list[Question], rounds: int) -> dict[str, Any]:
    """Time the three ways in turn and check that they give the same losses."""
    torch.manual_seed(0)
    tokenizer, cpu = get_tokenizer("gpt2"), Device(torch.device("cpu"), "CPU", "fp32")
    model = GPT2(SIZES["gpt2"])
    model.use(choose_compute(cpu, model.config.block_size))
    began = time.perf_counter()
    items = [tokenize(question, tokenizer) for question in questions]
    (packed,) = pack([(HellaSwag(), items)], model.config.block_size, cpu)
    packing = time.perf_counter() - began
    texts = [(item.context, item.candidates) for item in items]
    ways: dict[str, Callable[[], Tensor]] = {
        "lecture": lambda: lecture(model, texts),
        "row_by_row": lambda: row_by_row(model, texts),
        "packed": lambda: torch.stack(list(candidate_losses(model, packed, cpu).sums)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    apart = 0.0
    for _ in range(rounds):
        losses = {}
        for name, way in ways.items():
            began = time.perf_counter()
            losses[name] = way().double()
            seconds[name].append(time.perf_counter() - began)
        apart = max(apart, *((losses["lecture"] - x).abs().max().item() for x in losses.values()))
        if apart > 1e-3:  # sums of about 30 losses of 11 nats each, in float32
            raise SystemExit(f"the ways differ by {apart} nats")
        print({name: round(times[-1], 2) for name, times in seconds.items()}, flush=True)
    rows = 4 * len(questions)
    per_second = {n: statistics.median(rows / s for s in times) for n, times in seconds.items()}
    return {
        "questions": len(questions), "rows": rows, "rounds": rounds,
        "largest_difference_nats": apart,
        "packing_seconds": round(packing, 3),
        "tokens_row_by_row": sum(len(c) + len(e) for c, ends in texts for e in ends),
        "tokens_packed": sum(len(c) + sum(map(len, ends)) for c, ends in texts),
        "tokens_packed_and_padded": sum(batch.idx.numel() for batch in packed.batches),
        "times_faster_than_lecture": round(per_second["packed"] / per_second["lecture"], 2),
        "times_faster_than_row_by_row": round(per_second["packed"] / per_second["row_by_row"], 2),
        **{name: figures([rows / s for s in times]) for name, times in seconds.items()},
    }  # fmt: skip


def figures(rates: list[float]) -> dict[str, Any]:
    tenths = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates
    return {
        "rows_per_s": round(statistics.median(rates), 1),
        "rows_per_s_p10": round(tenths[0], 1),
        "rows_per_s_p90": round(tenths[-1], 1),
        "runs_rows_per_s": [round(rate, 1) for rate in rates],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="compare ways to score HellaSwag")
    parser.add_argument("--file", type=Path, required=True, help="HellaSwag, JSON lines or Parquet")
    parser.add_argument("--rows", type=int, default=100, metavar="N", help="questions to score")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    arguments = parser.parse_args()
    machine = environment("torch")
    result = compare(sample(read_questions(arguments.file), arguments.rows), arguments.rounds)
    write_result(arguments.out, {**machine, **result})
    print(
        f"{result['packed']['rows_per_s']} rows/s, {result['times_faster_than_lecture']} x the "
        f"lecture's, written to {arguments.out}"
    )


if __name__ == "__main__":
    main()
