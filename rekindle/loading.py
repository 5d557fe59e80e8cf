"""Loads the model behind a RUN_OR_MODEL argument: a run, a checkpoint, a folder, or a hub name."""

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
    """A model on its device, with its tokenizer and origin."""

    model: LanguageModel
    tokenizer: Tokenizer
    name: str
    run: Description | None = None  # the checkpoint's description, if it came from a run
    note: str = ""  # if the name is ambiguous: the other match, and which one was used


def load(name: str, device: Device) -> Loaded:
    """Load a run folder (its newest checkpoint), a checkpoint, a folder in Hugging Face's layout,
    or a model from the hub. Raises `UserError` if `name` is none of these."""
    loaded = _load(name)
    cast(nn.Module, loaded.model).to(device.torch)
    loaded.model.use(choose_compute(device, loaded.model.config.block_size))
    return loaded


def from_pretrained(name_or_folder: str | Path) -> GPT2:
    """The model alone, in float32 on the CPU, from anything that `load` accepts; its tokenizer may
    be unknown. This is `GPT2.from_pretrained`.

    A model from a run keeps the padding rows of its embedding. Warns if the name is ambiguous, and
    raises `UserError` if it cannot be loaded.
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
    """A model in Hugging Face's layout. Only GPT-2's own tokenizer is supported."""
    tokenizer = get_tokenizer("gpt2")
    if named.folder is not None:
        check_tokenizer(named.folder)
    model = names.read(named)
    rows = model.config.vocab_size
    if rows != tokenizer.vocab_size:
        more = rows - tokenizer.vocab_size
        advice = (
            f"the {more} extra rows may be padding, which is not supported yet" if more > 0
            else "it needs another tokenizer, which is not supported yet"
        )  # fmt: skip
        raise UserError(
            f"the embedding of {named.name} has {rows} rows, but GPT-2's tokenizer has "
            f"{tokenizer.vocab_size} ids: {advice}"
        )
    return Loaded(model, tokenizer, storage.printable(named.name), note=named.note)


def _load_ours(named: Named) -> Loaded:
    assert named.folder is not None
    saved = names.newest(named.folder)
    described = saved.description.tokenizer
    if described is None:
        raise UserError(f"{saved.path} was trained on arrays: its tokenizer is not recorded")
    tokenizer = get_tokenizer(described["name"])
    if described["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{saved.path} was trained with a different version of the tokenizer "
            f"{tokenizer.name} (SHA-256 {described['sha256'][:12]}, not "
            f"{tokenizer.sha256[:12]}): use the version of Rekindle that trained it"
        )
    if saved.config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{saved.path} has {saved.config.vocab_size} ids, but its tokenizer has "
            f"{tokenizer.vocab_size}"
        )
    name = storage.printable(saved.path)
    return Loaded(names.model_of(saved), tokenizer, name, saved.description, named.note)
