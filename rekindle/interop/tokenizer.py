"""Check the tokenizer files of a model in Hugging Face's layout: only GPT-2's are accepted."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rekindle import storage
from rekindle.errors import UserError

# SHA-256 of GPT-2's tokens, ordered by id, and of its merges, in order, one per line, from OpenAI's
# encoder.json and vocab.bpe.
TOKENS = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
END_OF_TEXT = ("<|endoftext|>", 50256)
CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# Files of tokenizers that are not byte-pair encodings like GPT-2's.
OTHERS = (
    "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.model",
    "sentencepiece.bpe.model", "bpe.codes", "tekken.json",
)  # fmt: skip


class _ForeignError(Exception):
    """A difference between a tokenizer file and GPT-2's."""


def check_tokenizer(folder: Path) -> None:
    """Raise `UserError` that names the file if a file in `folder` belongs to another tokenizer than
    GPT-2's. A folder without tokenizer files is assumed to use GPT-2's."""
    for name in OTHERS:
        if (folder / name).exists():
            raise _foreign(folder / name, "GPT-2's has no such file")
    for name, check in _CHECKS.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            check(_read_lines(file) if file.suffix in (".txt", ".bpe") else _read_object(file))
        except _ForeignError as error:
            raise _foreign(file, str(error)) from None


def _foreign(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} belongs to another tokenizer than GPT-2's ({reason}), which is not supported; if "
        "the model was trained with GPT-2's tokenizer, remove the file"
    )


def _read_object(file: Path) -> dict[str, Any]:
    value = storage.read_json(file)
    if not isinstance(value, dict):
        raise _ForeignError("it is not a JSON object")
    return value


def _read_lines(file: Path) -> dict[str, Any]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise _ForeignError(f"it cannot be read: {error}") from None
    return {"merges": [line for line in lines if line and not line.startswith("#version")]}


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="replace")).hexdigest()


def _check_vocabulary(vocab: Any) -> None:
    if not isinstance(vocab, dict) or any(type(i) is not int for i in vocab.values()):
        raise _ForeignError("it has no vocabulary")
    ordered = sorted(vocab, key=lambda token: vocab[token])
    if [vocab[token] for token in ordered] != list(range(50257)) or _sha256(ordered) != TOKENS:
        raise _ForeignError("other tokens or ids")


def _check_merges(described: dict[str, Any]) -> None:
    merges = described.get("merges")
    if not isinstance(merges, list) or not all(isinstance(m, str | list) for m in merges):
        raise _ForeignError("it has no merges")
    if _sha256(m if isinstance(m, str) else " ".join(map(str, m)) for m in merges) != MERGES:
        raise _ForeignError("other merges")


def _check_added(added: dict[str, Any]) -> None:
    for token, i in added.items():
        if (token, i) != END_OF_TEXT:
            raise _ForeignError(f"it adds the token {token!r} with the id {i}")


def _check_value(described: dict[str, Any], key: str, *allowed: Any) -> None:
    if (value := described.get(key)) not in allowed:
        raise _ForeignError(f"{key} is {str(value)[:60]!r}")


def _check_fast(described: dict[str, Any]) -> None:
    """tokenizer.json: a complete tokenizer in one file."""
    model = _part(described, "model")
    _check_value(model, "type", "BPE", None)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        _check_value(model, key, None, "", False)
    _check_value(described, "normalizer", None)
    before = _part(described, "pre_tokenizer")
    _check_value(before, "type", "ByteLevel")
    _check_value(before, "add_prefix_space", False, None)
    _check_value(before, "use_regex", True, None)
    after = _part(described, "post_processor")
    _check_value(after, "type", "ByteLevel", "TemplateProcessing", None)
    _check_value(after, "special_tokens", None, {})
    _check_value(_part(described, "decoder"), "type", "ByteLevel", None)
    added = described.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise _ForeignError("added_tokens is not a list of tokens")
    _check_added({str(token.get("content")): token.get("id") for token in added})
    _check_vocabulary(model.get("vocab"))
    _check_merges(model)


def _part(described: dict[str, Any], key: str) -> dict[str, Any]:
    part = described.get(key) or {}
    if not isinstance(part, dict):
        raise _ForeignError(f"{key} is {str(part)[:60]!r}")
    return part


def _check_settings(described: dict[str, Any]) -> None:
    """tokenizer_config.json."""
    _check_value(described, "tokenizer_class", *CLASSES, None)
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        _check_value(described, key, False, None)
    added = _part(described, "added_tokens_decoder")
    if not all(isinstance(token, dict) for token in added.values()):
        raise _ForeignError("added_tokens_decoder does not contain tokens")
    _check_added({str(t.get("content")): int(i) if i.isdecimal() else i for i, t in added.items()})


def _check_config(described: dict[str, Any]) -> None:
    """config.json, the configuration of the model, which may also describe its tokenizer."""
    _check_value(described, "tokenizer_class", *CLASSES, None)
    for key in ("bos_token_id", "eos_token_id"):
        _check_value(described, key, 50256, [50256], None)


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "config.json": _check_config,
    "tokenizer_config.json": _check_settings,
    "tokenizer.json": _check_fast,
    "added_tokens.json": _check_added,
    "vocab.json": _check_vocabulary,
    "encoder.json": _check_vocabulary,
    "merges.txt": _check_merges,
    "vocab.bpe": _check_merges,
}
