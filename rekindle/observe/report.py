"""Plots: the loss curve of a run, and the ladder."""

from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.errors import UserError
from rekindle.observe.metrics import RECORD
from rekindle.schema import mismatch

PICTURES = (".png", ".svg", ".pdf")


def draw_loss(run: Path, picture: Path) -> Path:
    """Draw training and validation loss of `run` into `picture` (one of `PICTURES`); return its
    path.

    Raises `UserError` if there is no log, no matplotlib, or `picture` has another suffix.
    """
    plt = _pyplot()
    _check_picture(picture)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} has no metrics.jsonl: it is not a run, or has not started")
    records = storage.read_json_lines(run / "metrics.jsonl", RECORD)
    training = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation" and r.get("loss") is not None]
    if wrong := mismatch([*training, *validation], [{"loss": (None, float)}]):
        raise UserError(f"{run / 'metrics.jsonl'} is damaged ({wrong})")
    if not training:
        raise UserError(f"{run} has not completed a step yet: there is nothing to plot")

    title = _title(run)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    axes.plot([r["step"] for r in training], [r["loss"] for r in training],
              color="#9db4c8", linewidth=1, label="training, each step")  # fmt: skip
    if validation:
        axes.plot([r["step"] for r in validation], [r["loss"] for r in validation],
                  color="#c8502d", marker="o", markersize=4, linewidth=0.8, linestyle="--",
                  label="validation")  # fmt: skip
        _label_last(axes, validation[-1])
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return _save(figure, picture)


def draw_ladder(result: dict[str, Any], picture: Path) -> Path:
    """Draw the rungs of a `ladder.json` as bars of tokens per second; return the path.

    Raises `UserError` if there is no matplotlib.
    """
    plt = _pyplot()
    rungs = result["rungs"]
    fastest = max(r["tokens_per_s"] for r in rungs)
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(rungs) + 1.1), dpi=150)
    for i, rung in enumerate(rungs):
        rate, last = rung["tokens_per_s"], i == len(rungs) - 1
        axes.barh(i, rate, height=0.5, color="#c8502d" if last else "#9db4c8")
        gain = rate / rungs[0]["tokens_per_s"]
        axes.text(rate + 0.01 * fastest, i, f"{rate:,.0f}   {gain:.2f} ×", va="center", fontsize=9)
        axes.text(0, i + 0.42, rung["why"], va="center", fontsize=7, color="#666666")
    axes.set_yticks(range(len(rungs)), [r["rung"] for r in rungs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * fastest)
    axes.set_xlabel("tokens per second")
    axes.set_title(
        f"{result['recipe']}, {result['rows']} × {result['length']} tokens per step, on "
        f"{result['device']} (torch {result['versions']['torch']}, {result['date']})",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, picture)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'rekindle[plot]'") from None
    return pyplot


def _check_picture(picture: Path) -> None:
    """Raise `UserError` for a path that matplotlib cannot write, or would write under another
    name."""
    if picture.is_dir():
        raise UserError(f"{picture} is a folder: name a file in it, such as {picture / 'loss.png'}")
    if picture.suffix.lower() not in PICTURES:
        *kinds, last = PICTURES
        raise UserError(f"cannot draw {picture}: its name must end in {', '.join(kinds)} or {last}")


def _save(figure: Any, picture: Path) -> Path:
    figure.tight_layout()
    figure.savefig(picture, metadata={"Software": None} if picture.suffix == ".png" else None)
    _pyplot().close(figure)
    return picture


def _label_last(axes: Any, record: dict[str, Any]) -> None:
    axes.annotate(f"{record['loss']:.3f}", (record["step"], record["loss"]), xytext=(0, 8),
                  textcoords="offset points", ha="right", color="#c8502d")  # fmt: skip


def _title(run: Path) -> str:
    numbers = {"model.n_layer": int, "model.n_embd": int, "batch.tokens": int, "seed": int}
    schema = {"recipe": {"name": str, **numbers}}
    recipe = storage.read_json(run / "run.json", schema)["recipe"]
    return (
        f"{recipe['name']}: {recipe['model.n_layer']} layers, {recipe['model.n_embd']} wide, "
        f"{recipe['batch.tokens']:,} tokens per step, seed {recipe['seed']}"
    )
