"""Resolve a model name: a local run, checkpoint or model folder, or else a model on the hub."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from rekindle import checkpoint
from rekindle.checkpoint import DESCRIPTION, Checkpoint, DamagedError
from rekindle.errors import UserError
from rekindle.interop import huggingface
from rekindle.interop.huggingface import HUB
from rekindle.model import LanguageModel
from rekindle.model.shapes import without_init

# Other names of the four sizes, without owner, case and punctuation. The parameter counts are those
# of the paper, of the model cards and of later counts.
ALIASES = {
    "gpt2": "gpt2 gpt2small gpt2base gpt2117m gpt2124m",
    "gpt2-medium": "gpt2medium gpt2345m gpt2355m",
    "gpt2-large": "gpt2large gpt2762m gpt2774m",
    "gpt2-xl": "gpt2xl gpt215b gpt21542m gpt21558m",
}
# Files that mark a folder as a published model, or as a run or checkpoint, even an incomplete one.
PUBLISHED = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip
OURS = ("run.json", "checkpoints", DESCRIPTION)


@dataclass(frozen=True)
class Named:
    """The model that a name refers to."""

    name: str  # as given by the user
    folder: Path | None  # None for the model on the hub with this name
    ours: bool = False  # whether the folder is a run or a checkpoint
    note: str = ""  # if the name is ambiguous: what else it matches, and which one is used


def find(name: str) -> Named:
    """Decide what `name` refers to. A folder takes precedence over a model on the hub, and within a
    folder a run or checkpoint over a model in Hugging Face's layout.

    Raises `UserError`, with the most similar known name, if there is no such model.
    """
    path = Path(name)
    if path.is_dir() and (name not in HUB or _holds(path, OURS) or _holds(path, PUBLISHED)):
        return _in_folder(name, path)
    if name in HUB:
        return Named(name, None)
    if path.is_file():
        raise UserError(f"{name} is a file: give its folder, {path.parent}")
    near = _meant(name)
    hint = f": did you mean {near}?" if near else ""
    raise UserError(f"{name} is neither a folder nor one of the models {', '.join(HUB)}{hint}")


def _holds(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).exists() for name in names)


def _in_folder(name: str, path: Path) -> Named:
    ours = _holds(path, OURS)
    kind = "folder"
    if ours:
        kind = "checkpoint" if (path / DESCRIPTION).is_file() else "run"
    others = []
    if ours and (path / "config.json").is_file():
        others.append("a model in Hugging Face's layout (config.json)")
    if name in HUB:
        others.append("a model on the hub")
    note = f"{name} is the {kind} {path.absolute()} and {' and '.join(others)}: using the {kind}"
    return Named(name, path, ours or not _holds(path, PUBLISHED), note if others else "")


def _meant(name: str) -> str:
    """The model on the hub whose name is most similar to `name`; empty if none is similar."""
    plain = re.sub("[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].lower())
    known = {alias: model for model, names in ALIASES.items() for alias in names.split()}
    near = get_close_matches(plain, known, n=1, cutoff=0.8)
    return known[near[0]] if near else ""


def read(named: Named) -> LanguageModel:
    """Read the model, in float32 on the CPU. The model of a run keeps the padding rows of its
    embedding. Raises `UserError` if it is missing, damaged or not a GPT-2."""
    if named.folder is None:
        return huggingface.from_files(*huggingface.hub_files(named.name))
    if named.ours:
        return model_of(newest(named.folder))
    return huggingface.from_pretrained(named.folder)


def newest(path: Path) -> Checkpoint:
    """Load the checkpoint that `path` refers to. Tries again if a training run removes it meanwhile
    in favor of a newer one."""
    for _ in range(9):
        found = checkpoint.find(path)
        _check_copied(found)
        try:
            return checkpoint.load(found)
        except DamagedError:
            if found.exists():
                raise
    raise UserError(
        f"the checkpoints of {path} are removed faster than they can be read: try again later"
    )


def _check_copied(folder: Path) -> None:
    """Raise `UserError` if a checkpoint was copied without its optimizer state."""
    model, optimizer = (folder / name for name in checkpoint.FILES)
    if model.exists() and not optimizer.exists() and (folder / DESCRIPTION).exists():
        raise UserError(
            f"{optimizer} does not exist: a checkpoint needs all its files, so copy the complete "
            "folder, or name another checkpoint"
        )


def model_of(saved: Checkpoint) -> LanguageModel:
    """The model of a checkpoint, on the CPU."""
    model = without_init(saved.model_class, saved.config)
    saved.restore_model(model)
    return model
