"""Reads a run folder: its recipe, its data and its log."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rekindle import recipes, storage
from rekindle.check import bands
from rekindle.data import shards
from rekindle.errors import UserError
from rekindle.observe.metrics import RECORD
from rekindle.schema import mismatch

RUN = {
    "recipe": {"name": str, "steps": int, "seed": int, "batch.tokens": int},
    "data": {"path": str, "fingerprint": str},
    "forked_from?": (None, str),
}
KINDS: dict[str, Any] = {
    "train": {"loss": (None, float), "seconds": float},
    "validation": {"loss": (None, float), "tokens": int},
    "hellaswag": {"acc_norm": float, "total": range(1, 2**53)},
}


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. `train` is by step, starting at 0; `validation` and `hellaswag`
    by optimizer steps taken."""

    folder: Path
    described: dict[str, Any]  # run.json
    manifest: shards.Manifest | None  # of its data; None if that is missing
    train: dict[int, dict[str, Any]]
    validation: dict[int, dict[str, Any]]
    hellaswag: dict[int, dict[str, Any]]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.described["recipe"]

    @cached_property
    def losses(self) -> dict[int, float]:
        """Validation losses that are not NaN, by optimizer steps taken."""
        return {s: r["loss"] for s, r in self.validation.items() if r["loss"] is not None}

    @property
    def steps(self) -> int:
        """Optimizer steps taken so far."""
        return max(self.train, default=-1) + 1

    @property
    def is_finished(self) -> bool:
        return self.steps >= self.recipe["steps"]

    @property
    def dataset(self) -> str | None:
        """The training data: `EDU`, `CLASSIC` or the name of another source. None if it is missing
        or was prepared from local files."""
        name = self.manifest.source.get("name") if self.manifest else None
        if not isinstance(name, str) or ": " in name:  # such as "parquet: FOLDER"
            return None
        return bands.SOURCES.get(name, name)

    def tokens(self, step: int) -> int:
        return step * self.recipe["batch.tokens"]

    def hours(self, step: int) -> float | None:
        """Hours of training for the first `step` steps, without evaluation; None if one of them is
        missing from the log."""
        if any(number not in self.train for number in range(step)):
            return None
        return sum(self.train[number]["seconds"] for number in range(step)) / 3600

    def changed_numbers(self) -> list[str]:
        """Differences from the named recipe, except for the seed."""
        registered = recipes.flatten(recipes.get_recipe(self.recipe["name"]))
        found = recipes.differences(self.recipe, registered)
        if self.recipe["steps"] != registered["steps"]:
            found.append(f"--steps {self.recipe['steps']} instead of {registered['steps']}")
        if forked := self.described.get("forked_from"):
            found.append(f"forked from {forked}")
        return [each for each in found if not each.startswith("--seed ")]


def read_run(folder: Path, data: Path | None = None) -> RunRecord:
    """Read a run folder. `data`: the folder of its shards, if they have moved.

    Raises `UserError` if it is not a run, its log is damaged, or `data` is other data.
    """
    for name in ("run.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: give a run folder that contains a log")
    described = storage.read_json(folder / "run.json", RUN)
    by_kind: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for record in storage.read_json_lines(folder / "metrics.jsonl", RECORD):
        kind = record["kind"]
        if kind not in KINDS:
            continue
        if wrong := mismatch(record, KINDS[kind]):
            raise UserError(f"{folder / 'metrics.jsonl'} is damaged ({wrong})")
        by_kind[kind][record["step"]] = record
    return RunRecord(folder, described, _manifest(described, data), **by_kind)


def _manifest(described: dict[str, Any], data: Path | None) -> shards.Manifest | None:
    """The manifest of the run's data; None if it is missing."""
    folder = data or Path(described["data"]["path"])
    if data is None and not (folder / shards.MANIFEST).is_file():
        return None
    manifest = shards.read_manifest(folder)
    if manifest.fingerprint == described["data"]["fingerprint"]:
        return manifest
    if data is not None:
        raise UserError(f"{data} is not the run's training data: leave out --data")
    return None
