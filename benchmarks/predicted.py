"""The tables of `benchmarks.tables` for what is counted and predicted without a GPU."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def steps(r: dict[str, Any]) -> list[list[str]]:
    """Predicted tokens/s of each card and way to compute, next to the measurement if there is
    one."""
    path = RESULTS / "gpu-step.json"
    measured = json.loads(path.read_text()) if path.exists() else {"arms": {}, "device": ""}
    # `benchmarks.gpu step` names its arms; it calls the default `lecture`.
    arms = {{"lecture": "autocast"}.get(k, k): x for k, x in measured["arms"].items()}
    rows = [
        ["card", "way to compute", "predicted tokens/s", "range if all rates are off", "measured"]
    ]
    for card, ways in r["cards"].items():
        for way, x in ways.items():
            seen = arms.get(way) if card in measured["device"] else None
            figure = f"{seen['tokens_per_s']:,}" if seen else "not measured"
            between = f"{x['low']:,} to {x['high']:,}"
            rows.append([card, way, f"{x['tokens_per_s']:,}", between, figure])
    return rows


def levers(r: dict[str, Any]) -> list[list[str]]:
    """Optimizations that are not built yet, and the time they are expected to save."""
    return [
        ["optimization", "ms per micro-batch"],
        *([name, ms] for name, ms in r["levers_ms"].items()),
    ]


def traffic(r: dict[str, Any]) -> list[list[str]]:
    """Memory traffic of a micro-batch, counted in generated code."""
    header = ["way to compute", "GB per layer", "GB of cross-entropy", "kernels per layer"]
    return [[*header, "buffers as large as the logits"]] + [
        [
            way, f"{x['layer']['memory_gb']:.2f}", f"{x['rest']['cross_entropy_gb']:.1f}",
            str(x["layer"]["kernels"]), str(sum(x["buffers_like_logits"].values())),
        ]
        for way, x in r["ways"].items()
    ]  # fmt: skip
