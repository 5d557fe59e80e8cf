"""What a name stands for: a run, a checkpoint or a folder here, or else a model of the hub."""

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

# Other names that people know the four sizes by, without owner, case and punctuation: their numbers
# of parameters as the paper, the model cards and later counts have them.
ALIASES = {
    "gpt2": "gpt2 gpt2small gpt2base gpt2117m gpt2124m",
    "gpt2-medium": "gpt2medium gpt2345m gpt2355m",
    "gpt2-large": "gpt2large gpt2762m gpt2774m",
    "gpt2-xl": "gpt2xl gpt215b gpt21542m gpt21558m",
}
# What a folder holds of a published model, or of a run: it is meant by its name, though
# it may be incomplete.
PUBLISHED = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip
OURS = ("run.json", "checkpoints", DESCRIPTION)


@dataclass(frozen=True)
class Named:
    """What a name stands for."""

    name: str  # as it was given
    folder: Path | None  # None: the model of the hub that has this name
    ours: bool = False  # whether the folder is a run or a checkpoint
    note: str = ""  # what else the name fits, and which of them was taken


def find(name: str) -> Named:
    """Decide what `name` stands for: a folder goes before a model of the hub, and in a folder a run
    or checkpoint before a model in Hugging Face's layout.

    Raises `UserError` with the name that was probably meant if it stands for nothing.
    """
    path = Path(name)
    if path.is_dir() and (name not in HUB or _holds(path, OURS) or _holds(path, PUBLISHED)):
        return _in_folder(name, path)
    if name in HUB:
        return Named(name, None)
    if path.is_file():
        raise UserError(f"{name} is a file: name the folder {path.parent} that it is in")
    near = _meant(name)
    hint = f": did you mean {near}?" if near else ""
    raise UserError(f"{name} is no folder and none of the models {', '.join(HUB)}{hint}")


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
        others.append("a model of the hub")
    note = f"{name} is the {kind} {path.absolute()} and {' and '.join(others)}: the {kind} is taken"
    return Named(name, path, ours or not _holds(path, PUBLISHED), note if others else "")


def _meant(name: str) -> str:
    """The model of the hub whose name is nearest to `name`; empty if none is near."""
    plain = re.sub("[^a-z0-9]", "", name.rstrip("/").rpartition("/")[2].lower())
    known = {alias: model for model, names in ALIASES.items() for alias in names.split()}
    near = get_close_matches(plain, known, n=1, cutoff=0.8)
    return known[near[0]] if near else ""


def read(named: Named) -> LanguageModel:
    """The model alone, float32 and on the CPU. That of a run keeps the padding rows of its
    embedding. Raises `UserError` if there is none, or it is damaged or no GPT-2."""
    if named.folder is None:
        return huggingface.from_files(*huggingface.hub_files(named.name))
    if named.ours:
        return model_of(newest(named.folder))
    return huggingface.from_pretrained(named.folder)


def newest(path: Path) -> Checkpoint:
    """The checkpoint that `path` stands for, while training may remove it for a newer one."""
    for _ in range(9):
        found = checkpoint.find(path)
        _check_copied(found)
        try:
            return checkpoint.load(found)
        except DamagedError:
            if found.exists():
                raise
    raise UserError(f"the checkpoints of {path} are removed faster than they can be read")


def _check_copied(folder: Path) -> None:
    """Say of a checkpoint that was copied without its optimizer's state what to do."""
    model, optimizer = (folder / name for name in checkpoint.FILES)
    if model.exists() and not optimizer.exists() and (folder / DESCRIPTION).exists():
        raise UserError(
            f"{optimizer} is not there: a checkpoint is read whole, so copy it with all its files, "
            "or name another checkpoint"
        )


def model_of(saved: Checkpoint) -> LanguageModel:
    """The model of a checkpoint, on the CPU."""
    model = without_init(saved.model_class, saved.config)
    saved.restore_model(model)
    return model
