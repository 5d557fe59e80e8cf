"""Predict training on 1 to 1,024 H100s. Nothing here is measured.

    python -m benchmarks.scaling           # write results/scaling.json, its tables and its chart
    python -m benchmarks.scaling --check   # exit status 1 if they are not up to date

A step consists of the micro-batches of `benchmarks.roofline`, one all-reduce of the gradients, and
AdamW. Evaluations, checkpoints and lost hosts are added. Every number that is not computed is
listed in `ASSUMED` with its source.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import roofline, scaling_page
from benchmarks.common import environment, write_result
from benchmarks.hopper import differences
from rekindle.model.gpt2_config import GPT2Config
from rekindle.recipes import Recipe, get_recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUT, DOCS, PICTURE = RESULTS / "scaling.json", ROOT / "docs/scaling.md", ROOT / "docs/scaling.png"
MODELS = ("gpt2-124m", "gpt2-medium", "gpt2-large", "gpt2-xl")
RANKS = tuple(2**i for i in range(11))
HOST = 8  # GPUs per host
MOST_ROWS = 64  # per micro-batch; more rows gain nothing
TRAFFIC = RESULTS / "traffic.json"
WAY = "autocast"  # what `rekindle train` does by default

ASSUMED = {
    "nvlink": (360e9, "bytes/s of a rank in an all-reduce within a host: 80 % of NVLink's 450 "
                      "GB/s in each direction (data sheet); the 80 % are assumed"),
    "nic": (45e9, "bytes/s of a rank between hosts: 90 % of 400 Gb/s per GPU, as in a host with "
                  "eight such network cards (data sheet); the 90 % are assumed"),
    "hop": (10e-6, "seconds of latency per hop: assumed"),
    "launch": (6e-6, "seconds for the host to launch a kernel of a compiled graph: assumed"),
    "memory": (72e9, "usable bytes of an H100: 90 % of 80 GB (data sheet)"),
    "saved": (36, "bytes kept for the backward pass per channel, layer and token: counted by "
                  "hand"),
    "copy": (25e9, "bytes/s from the GPU to pinned memory: assumed, half of 16 lanes of PCIe "
                   "5.0"),
    "restart": (120.0, "seconds from the loss of a host to the first step: assumed; the start "
                       "alone, with a warm cache, took 11.3 s on a CPU (results/startup.json)"),
    "deaths": (1.0, "hosts lost per day: chosen as the question"),
    "forward": (1 / 3, "of a training step's time, for the forward pass alone: a third of the "
                       "arithmetic"),
    "hellaswag": (10_042 * 192, "tokens of HellaSwag: its questions, times a guess at the "
                                "length of a question with its four endings"),
    "write": (1.49e9, "bytes/s of a checkpoint in the background, hashed and flushed: measured "
                      "on 2 cores (results/checkpoint.json)"),
    "reading": (3.75e-3, "seconds to read and permute 524,288 tokens, in a background thread: "
                         "measured on a CPU (results/batches.json)"),
}  # fmt: skip
A = {name: value for name, (value, _) in ASSUMED.items()}
DAY = 86_400


def ring_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `size` bytes: everything but its own part,
    twice. `benchmarks.allreduce` checks this with gloo."""
    return 2 * (ranks - 1) / ranks * size


def all_reduce(size: float, ranks: int, nic: float = A["nic"]) -> float:
    """Seconds of an all-reduce of `size` bytes: within each host over NVLink, then between hosts,
    where each of the host's GPUs sends its part at `nic` bytes/s."""
    local = min(ranks, HOST)
    hosts = ranks // local
    inside = ring_bytes(size, local) / A["nvlink"]
    between = ring_bytes(size / local, hosts) / nic
    hops = 2 * (local - 1) + 2 * math.ceil(
        math.log2(hosts)
    )  # a ring within hosts, a tree between them
    return inside + between + hops * A["hop"]


def sharded(config: GPT2Config, ranks: int, micro_batches: int) -> float:
    """Seconds of communication of a sharded step: for each micro-batch the weights are gathered
    twice and the gradients scattered once, half an all-reduce each, all in float32."""
    return micro_batches * 3 / 2 * all_reduce(4 * roofline.parameters(config), ranks)


def rows_that_fit(config: GPT2Config, T: int) -> int:
    """The largest power of two, at most 64, of windows that fit on a card with 16 bytes for each
    parameter (weight, gradient, two moments of AdamW); 0 if not even one fits."""
    free = A["memory"] - 16 * roofline.parameters(config)
    kept = A["saved"] * config.n_embd * config.n_layer * T
    logits = 2 * 2 * config.padded_vocab_size * T  # logits and their gradient, in bf16
    rows = int(free // (kept + logits)) if free > 0 else 0
    return min(MOST_ROWS, 1 << (rows.bit_length() - 1)) if rows else 0


@dataclass(frozen=True)
class Step:
    """Seconds of a training step, by part."""

    compute: float  # forward and backward passes, launches included
    all_reduce: float
    update: float
    tokens: int

    @property
    def seconds(self) -> float:
        return self.compute + self.all_reduce + self.update


def predict_step(recipe: Recipe, ranks: int, traffic: dict[str, Any]) -> Step | None:
    """A step of the recipe's batch on `ranks` H100s; None if there are fewer windows than ranks."""
    config, T = recipe.model.for_training(), recipe.batch.length
    if recipe.batch.rows < ranks:
        return None
    own = recipe.batch.rows // ranks
    micro = min(own, rows_that_fit(config, T))
    card, ways = roofline.CARDS["H100"], traffic["ways"]
    parts = roofline.micro_batch(card, WAY, traffic, config, micro, T)
    launched = config.n_layer * ways[WAY]["layer"]["kernels"] + ways[WAY]["rest"]["kernels"]
    once = max(sum(parts.values()), launched * A["launch"])
    # With torch.compile, DDP's all-reduces start when the backward pass ends: no overlap.
    reduced = all_reduce(4 * roofline.parameters(config), ranks) if ranks > 1 else 0.0
    update = roofline.update(card, config)
    return Step(own // micro * once, reduced, update, recipe.batch.tokens)


def run_costs(recipe: Recipe, step: Step, ranks: int) -> dict[str, float]:
    """The cost of evaluations, checkpoints and lost hosts, as fractions of the time, and the
    interval between checkpoints at which saving plus repeating work costs least."""
    interval = recipe.checkpoint_every * step.seconds
    stall = 12 * roofline.parameters(recipe.model.for_training()) / A["copy"]
    tokens = recipe.eval_tokens + A["hellaswag"]
    evaluation = A["forward"] * step.compute * tokens / recipe.batch.tokens
    between_deaths = DAY / A["deaths"]
    best = math.sqrt(2 * stall * between_deaths)  # Young 1974
    # A lost host costs the work since the checkpoint (half an interval) and the restart.
    return {
        "evaluation": evaluation / (recipe.eval_every * step.seconds),
        "checkpoints": stall / interval,
        "deaths": (interval / 2 + A["restart"]) / between_deaths,
        "best_checkpoints": stall / best,
        "best_deaths": (best / 2 + A["restart"]) / between_deaths,
        "write_s": 12 * roofline.parameters(recipe.model.for_training()) / A["write"],
        "interval_s": interval,
        "best_interval_s": best,
        "reading": A["reading"] * recipe.batch.tokens / 524_288 / ranks / step.seconds,
    }


def predict(traffic: dict[str, Any]) -> dict[str, Any]:
    """For each model and number of ranks: milliseconds of a step, tokens/s, and costs of a run."""
    models: dict[str, Any] = {}
    for name in MODELS:
        recipe = get_recipe(name)
        config = recipe.model.for_training()
        steps = {n: predict_step(recipe, n, traffic) for n in RANKS}
        one = steps[1]
        assert one
        ranks = {}
        for n, step in steps.items():
            if step is None:
                continue
            rate = step.tokens / step.seconds
            ranks[str(n)] = {
                "compute_ms": round(1e3 * step.compute, 1),
                "all_reduce_ms": round(1e3 * step.all_reduce, 1),
                "update_ms": round(1e3 * step.update, 1),
                "tokens_per_s": round(rate, -3),
                "efficiency": round(one.seconds / step.seconds / n, 3),
                **{k: float(f"{v:.3g}") for k, v in run_costs(recipe, step, n).items()},
            }
        useful = [n for n in RANKS[1:] if _gain(steps, n) >= 1.5]
        micro = rows_that_fit(config, recipe.batch.length)
        models[name] = {
            "parameters": roofline.parameters(config),
            "rows_that_fit": micro,
            "pays_up_to": max(useful, default=1),
            "one_card_a_host_ms_on_64": round(
                1e3 * all_reduce(4 * roofline.parameters(config), 64, A["nic"] / HOST), 1
            ),
            "sharded_ms_on_8": round(
                1e3 * sharded(config, HOST, max(1, recipe.batch.rows // HOST // micro)), 1
            ),
            "ranks": ranks,
        }
    return {
        "about": "predictions: nothing here was measured",
        "assumed": {name: {"value": v, "source": s} for name, (v, s) in ASSUMED.items()},
        "largest_without_sharding": round(A["memory"] / 16, -8),
        "models": models,
    }


def _gain(steps: dict[int, Step | None], n: int) -> float:
    """How much faster `n` GPUs are than half as many."""
    half, step = steps[n // 2], steps[n]
    return half.seconds / step.seconds if half and step else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description="predict training on 1 to 1,024 H100s")
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    o = parser.parse_args()
    predicted = json.loads(json.dumps(predict(json.loads(TRAFFIC.read_text()))))
    text = DOCS.read_text()
    if o.check:
        committed = json.loads(OUT.read_text())
        committed = {key: committed.get(key) for key in predicted}
        if different := differences(committed, predicted):
            sys.exit("\n".join(different))
        if scaling_page.with_table(text, predicted) != text:
            sys.exit("docs/scaling.md is out of date: run python -m benchmarks.scaling")
        return
    write_result(OUT, {**environment("torch"), **predicted})
    DOCS.write_text(scaling_page.with_table(text, predicted))
    scaling_page.draw(predicted, PICTURE)
    print(scaling_page.table(predicted))


if __name__ == "__main__":
    main()
