"""The tables of `benchmarks.tables` for what is counted and predicted without a GPU."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Arms of `benchmarks.gpu step` whose prediction has another name.
PREDICTED_AS = {"lecture": "autocast"}


def prediction(arm: str, device: str) -> dict[str, Any] | None:
    """The prediction for an arm on this GPU (`tokens_per_s`, `low`, `high`), or None."""
    for card, ways in json.loads((RESULTS / "predictions.json").read_text())["cards"].items():
        if card in device:
            return ways.get(PREDICTED_AS.get(arm, arm))
    return None


def steps(r: dict[str, Any]) -> list[list[str]]:
    """Predicted tokens/s of each card and way to compute, next to the measurement if there is
    one."""
    path = RESULTS / "gpu-step.json"
    measured = json.loads(path.read_text()) if path.exists() else {"arms": {}, "device": ""}
    arms = {PREDICTED_AS.get(k, k): x for k, x in measured["arms"].items()}
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


def parts(r: dict[str, Any]) -> list[list[str]]:
    """Milliseconds per micro-batch of each part of a step: measured, next to the prediction."""
    runs = {x["arm"]: x for x in r["runs"] if "parts_ms" in x and x["predicted"]}
    names = dict.fromkeys(name for x in runs.values() for name in x["parts_ms"])
    rows = [["arm", *names]]
    for arm, x in runs.items():
        ms = x["predicted"]["ms"]
        others = ms["gradient sums, gaps"] + ms["optimizer / 8"]
        expected = {**ms, "gradient sums, optimizer": others}
        measured = [f"{x['parts_ms'][name]:.1f}" for name in names]
        rows.append([arm, *measured])
        rows.append([f"{arm}, predicted", *(f"{expected[name]:.1f}" for name in names)])
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
