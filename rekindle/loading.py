"""RUN_OR_MODEL: whatever a person may name, as a model ready to evaluate or to speak."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from rekindle import storage
from rekindle.checkpoint import Description
from rekindle.data.tokenizer import Tokenizer, get_tokenizer
from rekindle.errors import UserError
from rekindle.interop import names
from rekindle.interop.names import Named
from rekindle.interop.tokenizer import check_tokenizer
from rekindle.model import LanguageModel
from rekindle.model.gpt2 import GPT2
from rekindle.runtime.device import Device, choose_compute


@dataclass(frozen=True)
class Loaded:
    """A model on its device, its tokenizer, and where it came from."""

    model: LanguageModel
    tokenizer: Tokenizer
    name: str
    run: Description | None = None  # the checkpoint's description, if it is one of ours
    note: str = ""  # what else the name fits, and which of them was taken


def load(name: str, device: Device) -> Loaded:
    """Load a run folder (its newest checkpoint), a checkpoint, a folder in Hugging Face's layout,
    or a model of the hub. Raises `UserError` that says what `name` is not."""
    loaded = _load(name)
    cast(nn.Module, loaded.model).to(device.torch)
    loaded.model.use(choose_compute(device, loaded.model.config.block_size))
    return loaded


def from_pretrained(name_or_folder: str | Path) -> GPT2:
    """The model alone, float32 and on the CPU, of anything that `load` takes; the tokenizer may be
    unknown. This is `GPT2.from_pretrained`.

    The model of a run keeps the padding rows of its embedding. Warns where two fit the name, and
    raises `UserError` that says what `name_or_folder` is not.
    """
    named = names.find(str(name_or_folder))
    if named.note:
        warnings.warn(named.note, stacklevel=2)
    model = names.read(named)
    if not isinstance(model, GPT2):
        raise UserError(f"{named.name} holds a {type(model).__name__}, not a GPT-2")
    return model


GPT2.from_pretrained = staticmethod(from_pretrained)


def _load(name: str) -> Loaded:
    named = names.find(name)
    return _load_ours(named) if named.ours else _load_published(named)


def _load_published(named: Named) -> Loaded:
    """A model in Hugging Face's layout, of which no tokenizer but GPT-2's can be used."""
    tokenizer = get_tokenizer("gpt2")
    if named.folder is not None:
        check_tokenizer(named.folder)
    model = names.read(named)
    rows = model.config.vocab_size
    if rows != tokenizer.vocab_size:
        more = rows - tokenizer.vocab_size
        advice = (
            f"the {more} more may be padding, and cannot be cut yet" if more > 0
            else "it belongs to another tokenizer, which cannot be used yet"
        )  # fmt: skip
        raise UserError(
            f"{named.name} has an embedding of {rows} rows, GPT-2's tokenizer "
            f"{tokenizer.vocab_size} ids: {advice}"
        )
    return Loaded(model, tokenizer, storage.printable(named.name), note=named.note)


def _load_ours(named: Named) -> Loaded:
    assert named.folder is not None
    saved = names.newest(named.folder)
    described = saved.description.tokenizer
    if described is None:
        raise UserError(f"{saved.path} was trained on arrays: it does not say which tokenizer")
    tokenizer = get_tokenizer(described["name"])
    if described["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{saved.path} was trained with another vocabulary than the tokenizer "
            f"{tokenizer.name} has (SHA-256 {described['sha256'][:12]}, not "
            f"{tokenizer.sha256[:12]}): use the version of Rekindle that trained it"
        )
    if saved.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{saved.path} has {saved.config.vocab_size} ids, its tokenizer {tokenizer.vocab_size}"
        )
    name = storage.printable(saved.path)
    return Loaded(names.model_of(saved), tokenizer, name, saved.description, named.note)
