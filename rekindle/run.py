"""A run folder: what identifies the run, and what is written there.

RUN/run.json          recipe, data and its fingerprint, written once at the start
RUN/metrics.jsonl     the log, one JSON object per line
RUN/checkpoints/      see `rekindle.checkpoint`

`rekindle.resume` decides whether to start, resume or fork a run.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rekindle import __version__, checkpoint, recipes, storage
from rekindle.checkpoint import Checkpoint, DamagedError, Description
from rekindle.data.shards import Manifest
from rekindle.errors import UserError
from rekindle.machine import Machine, MachineOptions
from rekindle.model import LanguageModel
from rekindle.observe.console import Console
from rekindle.observe.metrics import RECORD
from rekindle.optim import Optimizer
from rekindle.recipes import Recipe
from rekindle.runtime.distributed import TIMEOUT, World

SHARED_FOLDER = "use a folder that all hosts share"
# Log records whose step is counted from 0. The step of all other kinds is the number of steps done.
STEP_KINDS = ("train", "rollback", "return")


@dataclass(frozen=True)
class RunOptions:
    """Options that may change each time a run is started or resumed, unlike its recipe."""

    machine: MachineOptions = field(default_factory=MachineOptions)
    # Task name -> a file, "hub", "none", or "auto" (from the hub on a GPU, else none).
    tasks: Mapping[str, str] = field(default_factory=dict)
    timeout: float = TIMEOUT  # seconds that a rank may wait for the others; 0: no limit
    log_every: int = 0  # steps between printed lines; 0: one every ten seconds
    fork: Path | None = None  # run or checkpoint to take weights and optimizer state from


@dataclass
class Run:
    """A run that `resume.open_run` has checked and that is ready to start or resume."""

    folder: Path
    recipe: Recipe
    data: Path
    manifest: Manifest
    options: RunOptions
    model_class: type[LanguageModel]
    optimizer_class: type[Optimizer]
    checkpoint: Checkpoint | None  # the one to resume from
    damaged: dict[Path, str]  # newer checkpoints to set aside, with what is wrong with each
    forked_from: str | None

    @property
    def step(self) -> int:
        """Number of optimizer steps already taken."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def evaluated(self) -> bool:
        """Whether the checkpoint to resume from has been evaluated."""
        return bool(self.checkpoint and self.checkpoint.description.evaluated)

    @property
    def recorded(self) -> Machine | None:
        """The machine that the checkpoint was trained on."""
        return self.checkpoint.description.machine if self.checkpoint else None

    def agree(self, machine: Machine, world: World, device: torch.device) -> None:
        """Raise `UserError` unless all ranks have the same checkpoint, recipe, data and machine."""
        meaning = "the step of the newest complete checkpoint is"
        world.agree(self.step, meaning, SHARED_FOLDER, device)
        position = self.checkpoint.description.data_position if self.checkpoint else None
        same = (
            recipes.flatten(self.recipe), self.manifest.fingerprint, position, machine.agreed(),
        )  # fmt: skip
        number = int(hashlib.sha256(repr(same).encode()).hexdigest()[:8], 16)
        advice = "give every rank the same command, and data that was prepared once"
        world.agree(number, "the checksum of recipe, data and flags is", advice, device)

    def begin(self, lock: storage.Lock, console: Console) -> None:
        """Create the folder and run.json if the run is new, and clean up after an earlier process.
        Call it on the main rank only."""
        storage.make_folder(self.folder)
        new = not lock.held
        lock.take()
        if new and is_begun(self.folder):
            raise UserError(
                f"another process has just started a run in {self.folder}: run the same command "
                "again, or choose another --out"
            )
        storage.remove_unfinished(self.folder)
        self.write_identity()
        checkpoints = self.folder / "checkpoints"
        storage.make_folder(checkpoints)
        storage.remove_unfinished(checkpoints)
        for path, what in self.damaged.items():
            console.print(f"{what}: moved to {storage.set_aside(path)}")

    def write_identity(self) -> None:
        """Write run.json, unless it exists."""
        if not (self.folder / "run.json").exists():
            versions = {"rekindle": __version__, "torch": torch.__version__}
            storage.write_json(self.folder / "run.json", {**self.identity(), "versions": versions})

    def opening(self, ranks: int) -> str:
        """One line on where the run starts or resumes."""
        if not self.checkpoint:
            return f"run: {self.folder} starts at step 0 of {self.recipe.steps}"
        if self.forked_from and not (self.folder / "metrics.jsonl").exists():
            return f"run: {self.folder}, forked at step {self.step} of {self.forked_from}"
        before = self.checkpoint.description.ranks
        note = "" if before == ranks else f" (on {ranks} ranks instead of {before})"
        if self.step >= self.recipe.steps:
            return f"run: {self.folder} has finished all {self.step} steps; continue with --steps"
        return f"run: {self.folder} resumes at step {self.step} of {self.recipe.steps}{note}"

    def identity(self) -> dict[str, Any]:
        """What identifies this run; the contents of run.json."""
        m = self.manifest
        path = storage.printable(os.path.abspath(self.data))
        return {
            "recipe": recipes.flatten(self.recipe),
            "data": {"path": path, "fingerprint": m.fingerprint},
            "tokenizer": {"name": m.tokenizer, "sha256": m.tokenizer_sha256},
            "forked_from": self.forked_from,
        }

    def describe(
        self, trained: Description, *, evaluated: bool, validation: float | None
    ) -> Description:
        """The description of a checkpoint of this run. `trained`: from `Trainer.describe`."""
        return dataclasses.replace(
            trained, **self.identity(), evaluated=evaluated, validation_loss=validation
        )

    def open_log(self) -> storage.JsonLines:
        """Open the log, dropping the records from after the checkpoint to resume from."""
        return storage.JsonLines(self.folder / "metrics.jsonl", self.is_past, RECORD)

    def has_own_checkpoint(self) -> bool:
        """Whether the run resumes from its own checkpoint, rather than the parent's of a fork."""
        return bool(self.checkpoint and self.checkpoint.path.parent == self.folder / "checkpoints")

    def checkpoint_is_unlogged(self) -> bool:
        """Whether the process was killed after writing the checkpoint but before logging it."""
        if not self.has_own_checkpoint():
            return False
        log = self.folder / "metrics.jsonl"
        records = storage.read_json_lines(log, RECORD) if log.exists() else []
        return not any(r["kind"] == "checkpoint" and r["step"] == self.step for r in records)

    def is_past(self, record: dict[str, Any]) -> bool:
        """Whether a log record is from before the checkpoint, so that it is kept on resuming."""
        done = self.step
        if record["kind"] == "checkpoint" or (record["kind"] not in STEP_KINDS and self.evaluated):
            done += 1
        return record["step"] < done

    def amend(self, **changes: Any) -> None:
        """Change the description of the checkpoint to resume from, if it is this run's own."""
        if self.has_own_checkpoint():
            assert self.checkpoint
            self.checkpoint = checkpoint.amend(self.checkpoint, **changes)

    def find_rollback(self, world: World, device: torch.device) -> bool:
        """Set `checkpoint` to the newest one saved before the current series of skipped steps, and
        remove the later ones. Returns False if there is none.

        Call it on every rank, once the last checkpoint has been written.
        """
        later, found = [], None
        for path in reversed(checkpoint.list_checkpoints(self.folder / "checkpoints")):
            try:
                found = checkpoint.load(path, self.model_class)
            except DamagedError:  # the next start sets it aside
                continue
            if not found.description.guard["skipped"]:
                break
            later.append(path)
            found = None
        step = found.step if found else -1
        meaning = "the step of the checkpoint to roll back to is"
        world.agree(step, meaning, SHARED_FOLDER, device)
        if not found:
            return False
        self.checkpoint = found
        for path in later if world.is_main else []:
            storage.remove_folder(path)
        return True


def is_begun(out: Path) -> bool:
    """Whether the folder `out` contains a run, even if run.json is missing."""
    return (out / "run.json").exists() or bool(checkpoint.list_checkpoints(out / "checkpoints"))
