"""Compares runs with the bands: the lecture's recipe, the fast one, and OpenAI's GPT-2."""

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import mean

from rekindle.check import bands
from rekindle.check.record import RunRecord
from rekindle.check.report import Part, Row
from rekindle.errors import UserError

FAITHFUL, FAST = "gpt2-124m", "gpt2-124m-fast"
Evaluate = Callable[[RunRecord], float]  # the final loss of a run over FINAL_TOKENS tokens


def judge(runs: Sequence[RunRecord], price: float | None, evaluate: Evaluate) -> list[Part]:
    """One part per run, and one for all runs of the fast recipe on FineWeb together. `price`: of an
    hour on the training machine. Raises `UserError` for a recipe without bands."""
    for run in runs:
        if run.recipe["name"] not in (FAITHFUL, FAST):
            raise UserError(
                f"{run.folder} has the recipe {run.recipe['name']}, for which there are no bands: "
                f"give runs of {FAITHFUL} or {FAST}"
            )
    parts = []
    for run in runs:
        rows = judge_start(run)
        if run.recipe["name"] == FAITHFUL:
            rows += judge_curve(run)
            rows += [judge_end(run, evaluate)] if run.is_finished else []
        rows.append(surpassing(run, price))
        parts.append(Part(str(run.folder), tuple(rows), run.is_finished))
    fast = [run for run in runs if run.recipe["name"] == FAST and expected(run) == bands.CLASSIC]
    return [*parts, judge_record(fast)] if fast else parts


def expected(run: RunRecord) -> str:
    """The dataset; if that is unknown, the one that the bands are for."""
    return run.dataset or (bands.EDU if run.recipe["name"] == FAITHFUL else bands.CLASSIC)


def judge_start(run: RunRecord) -> list[Row]:
    """Check that the run has the named recipe and data that the bands are for."""
    changed = run.changed_numbers()
    name = run.recipe["name"]
    steps = f"{run.steps:,} of {run.recipe['steps']:,} steps"
    recipe = Row("recipe", "; ".join(changed) or f"{name}, {steps}", name, not changed)
    if run.dataset is None:
        text = f"unknown, assumed to be {expected(run)}"
        return [recipe, Row("data", text)]
    if name == FAST:  # the public record uses one of them, the comparison with GPT-2 the other
        both = (bands.EDU, bands.CLASSIC)
        return [recipe, Row("data", run.dataset, " or ".join(both), run.dataset in both)]
    assert run.manifest
    settings = run.manifest.source.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    layout = all(settings.get(key) == value for key, value in bands.LAYOUT.items())
    measured = f"{run.dataset}, layout {settings.get('layout')}"
    right = run.dataset == bands.EDU and layout
    return [recipe, Row("data", measured, f"{bands.EDU}, layout lecture", right)]


def judge_curve(run: RunRecord) -> list[Row]:
    """Compare with the published run: first losses, milestones and the full curve."""
    rows = []
    first = {s: run.train[s]["loss"] for s in range(len(bands.FIRST_LOSSES)) if s in run.train}
    if first and run.recipe["seed"] == bands.FIRST_SEED:
        rows.append(_worst("first training losses", [
            (step, loss, bands.FIRST_LOSSES[step], bands.FIRST_BAND) for step, loss in first.items()
        ]))  # fmt: skip
    points = {
        step: (step, record["loss"], bands.CURVE[step], bands.band_of(step, record["tokens"]))
        for step, record in run.validation.items()
        if step in bands.CURVE
    }
    rows += [_worst(f"loss at step {s:,}", [points[s]]) for s in bands.MILESTONES if s in points]
    if points:
        rows.append(_worst("published curve", list(points.values())))
    elif run.is_finished:
        rows.append(Row("published curve", "not measured", "validation every 250 steps", False))
    return rows


def _worst(what: str, points: list[tuple[int, float | None, float, float]]) -> Row:
    """A row for points (step, loss, published loss, band), with the one furthest from the published
    loss relative to its band. A loss of None is NaN."""
    inside = [loss is not None and abs(loss - like) <= band for _, loss, like, band in points]
    step, loss, like, band = max(
        points, key=lambda p: abs(p[1] - p[2]) / p[3] if p[1] is not None else float("inf")
    )
    measured = "nan" if loss is None else f"{loss:.4f}"
    if len(points) > 1:
        measured = f"{sum(inside)} of {len(points)} within, worst {measured} at step {step:,}"
    return Row(what, measured, f"{like:.4f} ± {band:.2f}", all(inside))


def judge_end(run: RunRecord, evaluate: Evaluate) -> Row:
    """Compare the final loss with the published one, over the same number of tokens."""
    last = run.validation.get(run.recipe["steps"])
    what, band = "final loss", f"{bands.FINAL_LOSS:.4f} ± {bands.FINAL_BAND}"
    band += f" over {bands.FINAL_TOKENS:,} tokens"
    try:
        logged = last and last["tokens"] == bands.FINAL_TOKENS
        loss = last["loss"] if last and logged else evaluate(run)
    except UserError as error:
        return Row(what, f"not measured: {error}", band, False)
    if loss is None:
        return Row(what, "nan", band, False)
    return Row(what, f"{loss:.4f}", band, abs(loss - bands.FINAL_LOSS) <= bands.FINAL_BAND)


def judge_record(runs: Sequence[RunRecord]) -> Part:
    """Apply the rule of the public record: the mean over n runs must be below 3.28 by a margin that
    shrinks with √n."""
    rows = []
    seeds = {run.recipe["seed"] for run in runs}
    rows.append(Row("seeds", f"{len(seeds)} in {len(runs)} runs", "all different",
                    len(seeds) == len(runs)))  # fmt: skip
    ends = [run.validation.get(run.recipe["steps"]) for run in runs]
    losses = [e["loss"] for e in ends if e and e["tokens"] == bands.RECORD_TOKENS and e["loss"]]
    rows.append(Row("finished runs", f"{len(losses)} of {len(runs)}",
                    f"validated over {bands.RECORD_TOKENS:,} tokens",
                    len(losses) == len(runs)))  # fmt: skip
    if losses:
        margin = (bands.RECORD_LOSS - mean(losses)) * sqrt(len(losses))
        rows.append(Row(
            "(3.28 - mean)·√n", f"{margin:.4f} (mean {mean(losses):.4f}, n {len(losses)})",
            f"at least {bands.RECORD_MARGIN}", margin >= bands.RECORD_MARGIN,
        ))  # fmt: skip
    return Part("the public record, FineWeb", tuple(rows))


def interval(accuracy: float, total: int) -> float:
    """Half of the 95 % confidence interval of an accuracy."""
    return 1.96 * sqrt(accuracy * (1 - accuracy) / total)


def surpassing(run: RunRecord, price: float | None) -> Row:
    """The first step at which the run surpasses GPT-2 124M in loss and HellaSwag, as the lecture
    compares them. Only a finished run on FineWeb-Edu can fail."""
    what = "GPT-2 124M surpassed"
    band = f"loss below {bands.GPT2_LOSS} and HellaSwag at least {bands.GPT2_HELLASWAG}"
    losses = {s for s, loss in run.losses.items() if loss < bands.GPT2_LOSS}
    scores = {s for s, r in run.hellaswag.items() if r["acc_norm"] >= bands.GPT2_HELLASWAG}
    if expected(run) != bands.EDU:
        score = _reached(run, "HellaSwag", scores, price)
        return Row(what, f"loss on {expected(run)} cannot be compared; {score}")
    both = losses & scores
    if both:
        return Row(what, _reached(run, "both", both, price), band)
    text = f"{_reached(run, 'loss', losses, price)}; {_reached(run, 'HellaSwag', scores, price)}"
    return Row(what, text, band, not run.is_finished)


def _reached(run: RunRecord, what: str, steps: set[int], price: float | None) -> str:
    """The first of `steps`, with its tokens, hours, cost and scores."""
    if not steps:
        known = run.hellaswag if what == "HellaSwag" else run.losses
        return f"{what} not reached" if known else f"{what} not measured"
    step = min(steps)
    parts = [f"{what} at step {step:,}", f"{run.tokens(step):,} tokens"]
    hours = run.hours(step)
    parts.append("hours unknown: the log lacks steps" if hours is None else f"{hours:.2f} h")
    if hours is not None and price is not None:
        parts.append(f"cost {hours * price:.2f} at {price:g} per hour")
    if (loss := run.losses.get(step)) is not None:
        parts.append(f"loss {loss:.4f}")
    if score := run.hellaswag.get(step):
        half = interval(score["acc_norm"], score["total"])
        parts.append(f"HellaSwag {score['acc_norm']:.4f} ± {half:.4f}")
    return ", ".join(parts)
