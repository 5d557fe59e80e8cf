"""`rekindle check`: compare runs and OpenAI's weights with published results.

Each value must lie in its band, see `bands`, which was fixed before our runs.
"""

from collections.abc import Sequence
from pathlib import Path

from rekindle.check import bands
from rekindle.check.record import RunRecord, read_run
from rekindle.check.report import Report
from rekindle.errors import UserError
from rekindle.observe.console import Console


def check(
    names: Sequence[str],
    *,
    data: Path | None = None,
    hellaswag: str = "hub",
    device: str = "auto",
    price: float | None = None,
    console: Console,
) -> Report:
    """Check run folders, or OpenAI's weights if `names` is only "gpt2".

    `data`: the shards of the runs, if they have moved; for OpenAI's weights, FineWeb-Edu.
    `hellaswag`: its file, or "hub", for OpenAI's weights. `price`: of an hour on the training
    machine. Raises `UserError` if a folder is not a run, or its recipe has no bands.
    """
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--price-per-hour must be at least 0, but is {price}")
    if list(names) == ["gpt2"] and not Path("gpt2", "run.json").exists():
        from rekindle.check.gpt2 import check_gpt2

        return Report((check_gpt2(data, hellaswag, device, console),))
    from rekindle.check.judge import judge

    def evaluate(run: RunRecord) -> float:
        from rekindle.check.gpt2 import measure

        shards = data or Path(run.described["data"]["path"])
        return measure(str(run.folder), shards, {}, device, console)["validation"]["loss"]

    return Report(tuple(judge([read_run(Path(n), data) for n in names], price, evaluate)))


__all__ = ["Report", "bands", "check"]
