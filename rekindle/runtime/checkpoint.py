"""Checkpoints: a folder of safetensors and JSON, whole or absent.

RUN/checkpoints/step-000250/
    model.safetensors      the parameters, under GPT-2's names
    optimizer.safetensors  AdamW's moments, as exp_avg.NAME and exp_avg_sq.NAME
    checkpoint.json        step, recipe, data, split, versions; each file's SHA-256 and its own
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rekindle import storage
from rekindle.errors import UserError

FORMAT = 1
DESCRIPTION = "checkpoint.json"
_NAME = re.compile(r"step-(\d{6,})")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from disk; its hashes have been checked."""

    path: Path
    description: dict[str, Any]
    model: dict[str, Tensor]

    @property
    def step(self) -> int:
        return self.description["step"]

    def restore_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give `optimizer` the moments and the count of updates it had."""
        moments = _read_tensors(self.path / "optimizer.safetensors")
        for name, p in model.named_parameters():
            state = {key: moments[f"{key}.{name}"].to(p.device) for key in _MOMENTS}
            count = torch.tensor(float(self.description["updates"]))
            fused = optimizer.defaults.get("fused")  # whose kernels count on the device
            optimizer.state[p] = {"step": count.to(p.device) if fused else count, **state}


class Snapshot:
    """A model's parameters and AdamW's moments as they were at one moment, in the CPU's memory.

    Takes 12 bytes for each parameter (1.5 GB for 124M) beside what training on a CPU needs. It is
    taken when this is made, so that a lack of it shows before the first step, and used again by
    every `take`. For a GPU it is pinned: only then can a copy go on while the CPU does else.
    """

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        sizes = [p.numel() for p in parameters.values()]
        self._pinned = next(iter(parameters.values())).is_cuda
        views = []
        for _ in range(1 + len(_MOMENTS)):  # a few large pieces: pinning rounds each one up
            flat = torch.empty(sum(sizes), pin_memory=self._pinned).zero_()  # now, not at a save
            pieces = zip(parameters.items(), flat.split(sizes), strict=True)
            views.append({name: piece.view_as(p) for (name, p), piece in pieces})
        self.model: dict[str, Tensor] = views[0]
        self.optimizer = {
            f"{key}.{name}": view
            for key, named in zip(_MOMENTS, views[1:], strict=True)
            for name, view in named.items()
        }
        self._updates = torch.zeros((), pin_memory=self._pinned)
        self._copied: torch.cuda.Event | None = None

    @property
    def updates(self) -> int:
        """Optimizer steps that were not refused."""
        return int(self._updates)

    def take(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy what is to be saved. On a GPU the copies are only begun, before whatever the GPU is
        given to do next; after `wait` they are whole."""
        for name, p in model.named_parameters():
            self._copy(p.detach(), self.model[name])
            state = optimizer.state.get(p)
            for key in _MOMENTS:
                moment = self.optimizer[f"{key}.{name}"]
                self._copy(state[key], moment) if state else moment.zero_()
            if state:
                self._copy(state["step"], self._updates)
        if self._pinned:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        if self._copied:
            self._copied.synchronize()

    def _copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=self._pinned)


def write(folder: Path, description: dict[str, Any], snapshot: Snapshot) -> Path:
    """Write the checkpoint of `description["step"]` under `folder`; return its path."""
    snapshot.wait()
    path = folder / f"step-{description['step']:06d}"
    with storage.new_folder(path) as new:
        for name, tensors in (("model", snapshot.model), ("optimizer", snapshot.optimizer)):
            arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
            new.write_tensors(f"{name}.safetensors", arrays)
        whole = {
            "format": FORMAT, **description, "updates": snapshot.updates, "files": dict(new.files),
        }  # fmt: skip
        new.write_json(DESCRIPTION, {**whole, "sha256": _description_sha256(whole)})
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first. Unfinished ones have other names."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 keeps all."""
    for path in list_checkpoints(folder)[:-keep] if keep else []:
        storage.remove_folder(path)


def find(path: Path) -> Path:
    """The checkpoint that a run folder or a checkpoint folder stands for: itself, or the newest.

    Raises `UserError` if it is neither.
    """
    if (path / DESCRIPTION).is_file():
        return path
    if found := list_checkpoints(path / "checkpoints"):
        return found[-1]
    if not path.exists():
        raise UserError(f"there is no {path}")
    if (path / "checkpoints").is_dir():
        raise UserError(f"the run {path} has no checkpoint yet: train it further")
    raise UserError(f"{path} is no run and no checkpoint: it has neither checkpoints/ nor "
                    f"{DESCRIPTION}")  # fmt: skip


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte. Raises `UserError` that names the damaged file."""
    description = storage.read_json(path / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{path / DESCRIPTION} is not a checkpoint of format {FORMAT}")
    if description.pop("sha256", None) != _description_sha256(description):
        raise UserError(
            f"{path / DESCRIPTION} is damaged (it is not what was written): remove {path}, and the "
            "run goes on from the checkpoint before"
        )
    for name in ("model.safetensors", "optimizer.safetensors"):
        file, entry = path / name, description["files"][name]
        if not file.is_file():
            raise UserError(f"the checkpoint {path} has lost its {name}: use another one")
        if file.stat().st_size != entry["bytes"] or storage.file_sha256(file) != entry["sha256"]:
            raise UserError(
                f"{file} is damaged (it is not the {entry['bytes']} bytes that were written): "
                f"remove {path}, and the run goes on from the checkpoint before"
            )
    return Checkpoint(path, description, _read_tensors(path / "model.safetensors"))


def _description_sha256(description: dict[str, Any]) -> str:
    """Identifies what a description says, its own hash apart."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not a safetensors file ({error})") from None
