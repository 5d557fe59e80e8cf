"""The tables and the chart of docs/scaling.md, from the predictions of `benchmarks.scaling`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = (1, 8, 64, 256, 512, 1024)


def table(predicted: dict[str, Any]) -> str:
    """The tables of docs/scaling.md."""
    models = predicted["models"]
    lines = _header("GPUs", models)
    for n in SHOWN:
        cells = []
        for model in models.values():
            x = model["ranks"].get(str(n))
            if x is None:
                cells.append("fewer windows than GPUs")
                continue
            ms = x["compute_ms"] + x["all_reduce_ms"] + x["update_ms"]
            rate = x["tokens_per_s"]
            shown = f"{rate / 1e6:.1f}M" if rate >= 1e6 else f"{rate / 1e3:.0f}k"
            cells.append(f"{shown}/s, {x['efficiency']:.0%} ({ms:,.0f} ms)")
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    lines += ["", *_header("", models)]
    for label, show in ROWS.items():
        cells = (show(model) for model in models.values())
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "windows per micro-batch": lambda m: str(m["rows_that_fit"]),
    "doubling to this many GPUs still gains 1.5 × or more": lambda m: f"{m['pays_up_to']:,}",
    "all-reduce on 8 GPUs, ms": lambda m: f"{m['ranks']['8']['all_reduce_ms']:.1f}",
    "all-reduce on 64 GPUs, ms": lambda m: f"{m['ranks']['64']['all_reduce_ms']:.1f}",
    "the same with one 400 Gb/s card per host, ms": lambda m: (
        f"{m['one_card_a_host_ms_on_64']:.0f}"
    ),
    "communication on 8 GPUs with `--shard`, ms": lambda m: f"{m['sharded_ms_on_8']:,.0f}",
    "on 64 GPUs: time for evaluation": lambda m: f"{m['ranks']['64']['evaluation']:.1%}",
    "on 64 GPUs: time for checkpoints every 250 steps": lambda m: (
        f"{m['ranks']['64']['checkpoints']:.2%}"
    ),
    "on 64 GPUs: time lost with one host lost per day": lambda m: (
        f"{m['ranks']['64']['deaths']:.2%}"
    ),
    "on 64 GPUs: seconds between checkpoints": lambda m: f"{m['ranks']['64']['interval_s']:,.0f}",
    "seconds to write a checkpoint in the background": lambda m: (
        f"{m['ranks']['64']['write_s']:.1f}"
    ),
    "best seconds between checkpoints": lambda m: f"{m['ranks']['64']['best_interval_s']:,.0f}",
    "time for checkpoints at the best interval": lambda m: (
        f"{m['ranks']['64']['best_checkpoints']:.2%}"
    ),
    "time lost at the best interval, one host per day": lambda m: (
        f"{m['ranks']['64']['best_deaths']:.2%}"
    ),
}


def _header(first: str, models: dict[str, Any]) -> list[str]:
    return [f"| {first} | {' | '.join(models)} |", "|---|" + "---|" * len(models)]


def with_table(text: str, predicted: dict[str, Any]) -> str:
    """The page with the tables between its two marks replaced."""
    marks = r"(<!-- predicted by benchmarks.scaling -->\n).*?(<!-- end -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{table(predicted)}\n\n{m[2]}", text, flags=re.S)


def draw(predicted: dict[str, Any], path: Path) -> None:
    """Plot tokens/s over GPUs, and the parts of a step of the 124M model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, model in predicted["models"].items():
        ranks = model["ranks"]
        n = [int(k) for k in ranks]
        (line,) = left.plot(n, [x["tokens_per_s"] for x in ranks.values()], ".-", label=name)
        first = ranks["1"]["tokens_per_s"]
        left.plot(n, [first * k for k in n], ":", color=line.get_color(), linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="H100s", ylabel="tokens/s")
    left.set_title("predicted; dotted: perfect scaling", fontsize=10)
    left.legend(fontsize=8)
    ranks = predicted["models"]["gpt2-124m"]["ranks"]
    bottom = [0.0] * len(ranks)
    for key, label in (
        ("compute_ms", "forward and backward"), ("all_reduce_ms", "all-reduce"),
        ("update_ms", "AdamW and the wait for the loss"),
    ):  # fmt: skip
        total = [sum(x[k] for k in ("compute_ms", "all_reduce_ms", "update_ms")) for x in
                 ranks.values()]  # fmt: skip
        share = [100 * x[key] / t for x, t in zip(ranks.values(), total, strict=True)]
        right.bar([*ranks], share, bottom=bottom, label=label)
        bottom = [b + s for b, s in zip(bottom, share, strict=True)]
    right.set(xlabel="H100s", ylabel="% of a step")
    right.set_title("gpt2-124m: parts of a step, predicted", fontsize=10)
    right.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
