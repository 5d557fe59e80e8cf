"""Predict the time of a training step on an H200 and an H100.

    python -m benchmarks.roofline           # write results/predictions.json
    python -m benchmarks.roofline --check   # exit status 1 if that file is not what this computes

Memory-bound kernels take bytes / bandwidth (`benchmarks.traffic` counts the bytes); matmuls take
operations / rate, with a rate for each shape; attention likewise has a rate. The sources of the
rates are given below. The predictions were committed before the first measurement, so that it could
contradict them. Since then, only the MLP kernel's rate has been replaced by a measured one.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment, write_result
from benchmarks.hopper import differences
from rekindle.model.gpt2_config import SIZES, GPT2Config

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "predictions.json"
Matmul = tuple[int, int, int, bool]  # M, K, N, and whether our kernel fuses GELU into it


@dataclass(frozen=True)
class Rates:
    """Sustained rates of a card."""

    memory: float  # bytes/s of kernels that only move memory
    matmul: float  # FLOP/s of bf16 matmuls as K grows
    attention: float  # FLOP/s of causal attention at head size 64, forward and backward together
    mlp_kernel: float  # FLOP/s of our Triton matmul with GELU
    sms: int = 132


# H200: a single bf16 matmul of 8192³ reaches 770-798 TFLOP/s (assumed: 740 within a step, at the
# power limit), and real kernels 3.65 of the data sheet's 4.8 TB/s. H100 SXM: the same chip and
# power, and the same fraction of its 3.35 TB/s. Also assumed: the rate of cuDNN's attention. The
# MLP kernel's rate was measured on an H200, outside of a step: 309 GFLOP in 0.74 ms forward and
# 0.65 ms backward. It is assumed to be the same on an H100.
CARDS = {
    "H200": Rates(memory=3.65e12, matmul=740e12, attention=280e12, mlp_kernel=445e12),
    "H100": Rates(memory=2.55e12, matmul=740e12, attention=280e12, mlp_kernel=445e12),
}
SPREAD = {"memory": 0.07, "matmul": 0.05, "attention": 0.1, "mlp_kernel": 0.06}  # of the rates
FILL = 128  # assumed: the first loads and last stores of a matmul cost as much as 128 more of K
SPLIT = 0.9  # assumed: fraction of the rate if K is split, for lack of tiles to fill the SMs
GAP_S = 1.5e-6  # assumed: between two dependent kernels
REFILL_S = 2.4e-3  # assumed: once per step, the host reads the loss and refills the launch queue
# AdamW reads weight, gradient and two moments and writes three of them; the norm reads the
# gradient, zeroing writes it. All are float32.
OPTIMIZER_BYTES = 4 * (4 + 3 + 1 + 1)
# The gradient of a micro-batch is added to the sum: two reads and a write.
ACCUMULATE_BYTES = 12

# Hand estimates of optimizations that are not built yet, in ms per micro-batch of 64 rows on an
# H200, from the kernels and gaps of a profiled step (benchmarks/LOG.md).
LEVERS = {
    "MLP kernel: earlier loads in the backward pass, and tanh.approx": "0.5 to 1.5",
    "micro-batches of 128 rows: half as many sums of gradients and casts of weights": "0.8",
    "one bf16 copy of the weights per step": "0.7",
    "bias gradient of queries, keys and values summed while they are concatenated": "0.9",
    "bias gradients of the projections summed by the kernel before": "0.8",
    "sums of LayerNorm's gradients in one kernel": "0.6",
    "matmul kernel selected per shape": "0 to 3",
}


def matmuls(config: GPT2Config, N: int, mlp_kernel: bool) -> Counter[Matmul]:
    """Every matmul of forward and backward pass over N positions: (M, K, N, GELU) → count."""
    C, V, L = config.n_embd, config.padded_vocab_size, config.n_layer
    found: Counter[Matmul] = Counter()
    for fan_in, fan_out, times in (
        (C, 3 * C, L), (C, C, L), (C, 4 * C, L), (4 * C, C, L), (C, V, 1),
    ):  # fmt: skip
        # GELU is fused into the first one's forward pass, its derivative into the second's
        # backward.
        found[N, fan_in, fan_out, mlp_kernel and fan_out == 4 * C] += times
        found[N, fan_out, fan_in, mlp_kernel and fan_in == 4 * C] += times
        found[fan_out, N, fan_in, False] += times
    return found


def matmul_rate(card: Rates, M: int, K: int, N: int, gelu: bool) -> float:
    """FLOP/s: tiles of 128 × 256 in full waves over the SMs, each with its fill and drain."""
    if gelu:
        return card.mlp_kernel
    tiles = math.ceil(M / 128) * math.ceil(N / 256)
    waves = SPLIT if tiles < 4 * card.sms else tiles / (math.ceil(tiles / card.sms) * card.sms)
    return card.matmul * waves * K / (K + FILL)


def attention_flops(config: GPT2Config, tokens: int, T: int) -> float:
    """FLOPs of causal attention in all layers: two matmuls forward and five backward over half of
    T × T."""
    return 7 * 2 * tokens * T / 2 * config.n_embd * config.n_layer


def parameters(config: GPT2Config) -> int:
    C, L = config.n_embd, config.n_layer
    return config.padded_vocab_size * C + config.block_size * C + L * (12 * C * C + 13 * C) + 2 * C


def micro_batch(
    card: Rates, way: str, traffic: dict[str, Any], config: GPT2Config, rows: int, T: int = 1024
) -> dict[str, float]:
    """Seconds of forward and backward pass over `rows` windows, by part.

    `traffic` holds the bytes counted for 124M at 64 rows. They are scaled by rows and width. The
    bytes of the weights scale differently, but are less than a tenth of the total.
    """
    found, base = traffic["ways"][way], SIZES["gpt2"]
    tokens = rows * T
    scale = tokens / traffic["rows"]
    width = config.n_embd / base.n_embd
    layer, rest = found["layer"], found["rest"]
    moved = scale * width * (config.n_layer * layer["memory_gb"] + rest["memory_gb"]) * 1e9
    logits = 2 * tokens * config.padded_vocab_size  # bytes
    # Our kernel reads and writes them in memory once each: between, a row stays in L2. Its threads
    # wait for each other only at the end of a row, which is not counted.
    loss = scale * rest["cross_entropy_gb"] * 1e9 if "kernel" not in way else 2 * logits
    launched = config.n_layer * layer["kernels"] + rest["kernels"]
    return {
        "matmuls": sum(
            times * 2 * M * K * N / matmul_rate(card, M, K, N, gelu)
            for (M, K, N, gelu), times in matmuls(config, tokens, way.endswith("kernels")).items()
        ),
        "attention": attention_flops(config, tokens, T) / card.attention,
        "memory-bound": moved / card.memory,
        "cross-entropy": loss / card.memory,
        "gradient sums, gaps": (
            ACCUMULATE_BYTES * parameters(config) / card.memory + launched * GAP_S
        ),
    }


def update(card: Rates, config: GPT2Config) -> float:
    """Seconds of the work done once per step: clipping and AdamW, while the host prepares the next
    step."""
    return max(OPTIMIZER_BYTES * parameters(config) / card.memory, REFILL_S)


def step(card: Rates, way: str, traffic: dict[str, Any]) -> dict[str, float]:
    """Seconds of one of the eight micro-batches of the lecture's step, by part."""
    config = SIZES["gpt2"].for_training()
    return {
        **micro_batch(card, way, traffic, config, rows=64),
        "optimizer / 8": update(card, config) / 8,
    }


def changed(card: Rates, sign: int) -> Rates:
    """The card with every rate changed by its spread, in the direction of `sign`."""
    rates = {name: getattr(card, name) * (1 + sign * by) for name, by in SPREAD.items()}
    return Rates(**rates, sms=card.sms)


def predict(traffic: dict[str, Any]) -> dict[str, Any]:
    """For each card and way to compute: milliseconds by part, and tokens/s with their range."""
    tokens = traffic["rows"]

    def rate(card: Rates, way: str) -> int:
        return 1000 * round(tokens / sum(step(card, way, traffic).values()) / 1000)

    cards = {
        name: {
            way: {
                "ms": {k: round(1e3 * s, 1) for k, s in step(card, way, traffic).items()},
                "tokens_per_s": rate(card, way),
                "low": rate(changed(card, -1), way),
                "high": rate(changed(card, 1), way),
            }
            for way in traffic["ways"]
        }
        for name, card in CARDS.items()
    }
    shapes = [
        {
            "shape": f"{M} × {K} × {N}" + (" with GELU" if gelu else ""),
            "times": times,
            "tflops_per_s": round(matmul_rate(CARDS["H200"], M, K, N, gelu) / 1e12),
            "ms": round(1e3 * times * 2 * M * K * N / matmul_rate(CARDS["H200"], M, K, N, gelu), 2),
        }
        for (M, K, N, gelu), times in matmuls(SIZES["gpt2"].for_training(), tokens, False).items()
    ]
    return {
        "about": "predictions; of the rates, only the MLP kernel's was measured",
        "rates": {name: asdict(card) for name, card in CARDS.items()},
        "spread_of_rates": SPREAD,
        "cards": cards,
        "matmuls_on_h200": shapes,
        "levers_ms": LEVERS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="predict a training step on an H200 and an H100")
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    o = parser.parse_args()
    predicted = predict(json.loads((RESULTS / "traffic.json").read_text()))
    if o.check:
        committed = json.loads(OUT.read_text())
        committed = {key: committed.get(key) for key in predicted}
        if different := differences(committed, json.loads(json.dumps(predicted))):
            sys.exit("\n".join(different))
    else:
        write_result(o.out, {**environment("torch"), **predicted})
    for name, ways in predicted["cards"].items():
        for way, x in ways.items():
            print(f"{name} {way:20} {sum(x['ms'].values()):6.1f} ms, predicted", end=" ")
            print(f"{x['tokens_per_s']:,} tokens/s ({x['low']:,} to {x['high']:,})")


if __name__ == "__main__":
    main()
