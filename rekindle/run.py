"""A run's folder: what is recorded there, and what it was started with.

RUN/run.json          recipe, data and fingerprint, written once at the start
RUN/metrics.jsonl     one object a line, for programs
RUN/checkpoints/      see `rekindle.checkpoint`

`rekindle.resume` decides whether a folder holds a new run, one to resume, or a fork.
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
from rekindle.runtime.distributed import PATIENCE, World

SHARE = "give a folder that all hosts share"
OF_STEPS = ("train", "rollback", "return")  # records of steps; other kinds come after a step


@dataclass(frozen=True)
class RunOptions:
    """What belongs to this start of a run, and not to its recipe."""

    machine: MachineOptions = field(default_factory=MachineOptions)
    # By a task's name: a file, "hub", "none", or "auto", from the hub on a GPU.
    tasks: Mapping[str, str] = field(default_factory=dict)
    timeout: float = PATIENCE  # seconds that a rank may wait for the others; 0: forever
    log_every: int = 0  # steps between printed lines; 0: one every ten seconds
    fork: Path | None = None  # run or checkpoint whose weights and optimizer state to start from


@dataclass
class Run:
    """A run that can start or resume: `resume.open_run` has checked it."""

    folder: Path
    recipe: Recipe
    data: Path
    manifest: Manifest
    options: RunOptions
    model_class: type[LanguageModel]
    optimizer_class: type[Optimizer]
    checkpoint: Checkpoint | None  # where it resumes
    damaged: dict[Path, str]  # newer checkpoints, to be set aside, and what is wrong with them
    forked_from: str | None

    @property
    def step(self) -> int:
        """Optimizer steps already taken."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def evaluated(self) -> bool:
        """Whether what follows this step (the validation and so on) has been done."""
        return bool(self.checkpoint and self.checkpoint.description.evaluated)

    @property
    def recorded(self) -> Machine | None:
        """What the run computed on so far."""
        return self.checkpoint.description.machine if self.checkpoint else None

    def agree(self, machine: Machine, world: World, device: torch.device) -> None:
        """Raise `UserError` if another rank was started with anything else than this one."""
        world.agree(self.step, "the newest whole checkpoint is that of step", SHARE, device)
        position = self.checkpoint.description.data_position if self.checkpoint else None
        same = (
            recipes.flatten(self.recipe), self.manifest.fingerprint, position, machine.agreed(),
        )  # fmt: skip
        number = int(hashlib.sha256(repr(same).encode()).hexdigest()[:8], 16)
        advice = "give every rank the same command, and data that was prepared once"
        world.agree(number, "recipe, data and flags have the checksum", advice, device)

    def begin(self, lock: storage.Lock, console: Console) -> None:
        """Write the run down if it is new, and tidy its folder; on the main rank."""
        storage.make_folder(self.folder)
        new = not lock.held
        lock.take()
        if new and is_begun(self.folder):
            raise UserError(
                f"another process has begun {self.folder} meanwhile: give the same command "
                "again, or another --out"
            )
        storage.remove_unfinished(self.folder)
        if not (self.folder / "run.json").exists():
            versions = {"rekindle": __version__, "torch": torch.__version__}
            storage.write_json(self.folder / "run.json", {**self.identity(), "versions": versions})
        checkpoints = self.folder / "checkpoints"
        storage.make_folder(checkpoints)
        storage.remove_unfinished(checkpoints)
        for path, what in self.damaged.items():
            console.print(f"{what}: it is now {storage.set_aside(path)}")

    def opening(self, ranks: int) -> str:
        """One line on where the run starts or resumes."""
        if not self.checkpoint:
            return f"run: {self.folder}, {self.recipe.steps:,} steps from the beginning"
        if self.forked_from and not (self.folder / "metrics.jsonl").exists():
            return f"run: {self.folder}, forked at step {self.step} of {self.forked_from}"
        before = self.checkpoint.description.ranks
        note = "" if before == ranks else f" (on {ranks} ranks instead of {before})"
        if self.step >= self.recipe.steps:
            return f"run: {self.folder} has all its {self.step} steps; --steps takes it further"
        return f"run: {self.folder} resumes at step {self.step} of {self.recipe.steps}{note}"

    def identity(self) -> dict[str, Any]:
        """What makes it this run and no other."""
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
        """What a checkpoint of this run says of itself. `trained`: what the trainer says."""
        return dataclasses.replace(
            trained, **self.identity(), evaluated=evaluated, validation_loss=validation
        )

    def open_log(self) -> storage.JsonLines:
        """The run's log, without what was logged after the checkpoint it resumes from."""
        return storage.JsonLines(self.folder / "metrics.jsonl", self.is_past, RECORD)

    def has_own_checkpoint(self) -> bool:
        """Whether it resumes from a checkpoint of its own, and not from another run's."""
        return bool(self.checkpoint and self.checkpoint.path.parent == self.folder / "checkpoints")

    def checkpoint_is_unlogged(self) -> bool:
        """Whether the process was killed after it wrote the checkpoint and before it logged it."""
        if not self.has_own_checkpoint():
            return False
        log = self.folder / "metrics.jsonl"
        records = storage.read_json_lines(log, RECORD) if log.exists() else []
        return not any(r["kind"] == "checkpoint" and r["step"] == self.step for r in records)

    def is_past(self, record: dict[str, Any]) -> bool:
        """Whether a record describes what the checkpoint already contains."""
        done = self.step
        if record["kind"] == "checkpoint" or (record["kind"] not in OF_STEPS and self.evaluated):
            done += 1
        return record["step"] < done  # a step is numbered from 0, what comes after it from 1

    def amend(self, **changes: Any) -> None:
        """Change the description of the checkpoint it resumes from, if it is this run's."""
        if self.has_own_checkpoint():
            assert self.checkpoint
            self.checkpoint = checkpoint.amend(self.checkpoint, **changes)

    def find_rollback(self, world: World, device: torch.device) -> bool:
        """Resume from the newest checkpoint that was saved before the steps that are now skipped;
        False if there is none. On every rank; the last checkpoint must be whole."""
        later, found = [], None
        for path in reversed(checkpoint.list_checkpoints(self.folder / "checkpoints")):
            try:
                found = checkpoint.load(path, self.model_class)
            except DamagedError:  # to be set aside by the next start
                continue
            if not found.description.guard["skipped"]:
                break
            later.append(path)
            found = None
        step = found.step if found else -1
        world.agree(step, "the checkpoint to roll back to is that of step", SHARE, device)
        if not found:
            return False
        self.checkpoint = found
        for path in later if world.is_main else []:
            storage.remove_folder(path)
        return True


def is_begun(out: Path) -> bool:
    """Whether there is a run in `out`, whole or not."""
    return (out / "run.json").exists() or bool(checkpoint.list_checkpoints(out / "checkpoints"))
