"""How much text is held out for validation where the source has few or long documents."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rekindle.data import layout, shards
from rekindle.data.prepare import prepare
from rekindle.data.sources import from_arguments, local

Held = tuple[shards.Manifest, dict[str, bytes]]


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Held]:
    """`prepared(texts, val_tokens)`: the manifest, and each split's tokens of a byte tokenizer, as
    text without the marks between documents. `one_file`: the texts as they are, in a file."""

    def call(
        texts: list[str], val_tokens: int, *, one_file: bool = False, shard_tokens: int = 10**8
    ) -> Held:
        path = tmp_path / ("input.txt" if one_file else "input.jsonl")
        lines = texts if one_file else [json.dumps({"text": text}) + "\n" for text in texts]
        path.write_text("".join(lines))
        source = from_arguments(None, **{"text" if one_file else "jsonl": [path]})
        out = tmp_path / "out"
        manifest = prepare(
            source, out, tokenizer="bytes", val_tokens=val_tokens, shard_tokens=shard_tokens
        )
        splits = {}
        for split in ("train", "val"):
            tokens = np.concatenate([[], *shards.open_split(out, manifest, split)])
            splits[split] = bytes(tokens[tokens < 256].astype(np.uint8))
        return manifest, splits

    return call


def words(count: int, start: int = 0) -> str:
    return " ".join(f"word{i}" for i in range(start, start + count))


def test_one_document_gives_its_tail(prepared: Callable[..., Held]) -> None:
    text = words(3000)
    manifest, splits = prepared([text], 700, one_file=True)
    assert manifest.tokens("val") == 700
    assert splits["train"] + splits["val"] == text.encode()


def test_at_most_a_tenth_of_a_small_text_is_held_out(prepared: Callable[..., Held]) -> None:
    text = words(300)
    manifest, splits = prepared([text], 10**6, one_file=True)
    assert manifest.tokens("val") == (len(text) + 1) // 10
    assert splits["train"] + splits["val"] == text.encode()


@pytest.mark.parametrize("start", range(3))
def test_few_long_documents_give_about_what_was_asked(
    prepared: Callable[..., Held], start: int
) -> None:
    """By their hash alone 171 documents give several times as much, or nothing."""
    texts = [words(400, 7 * i + start) for i in range(171)]
    manifest, splits = prepared(texts, 3000)
    assert 3000 / layout.TOLERANCE <= manifest.tokens("val") <= 3000 * layout.TOLERANCE
    assert sorted(splits["train"] + splits["val"]) == sorted("".join(texts).encode())


def test_many_documents_are_chosen_by_their_hash_alone(prepared: Callable[..., Held]) -> None:
    texts = [f"document {i} " + words(5, i) for i in range(3000)]
    manifest, splits = prepared(texts, 6000)
    assert 6000 / layout.TOLERANCE < manifest.tokens("val") < 6000 * layout.TOLERANCE
    held = [text for text in texts if text.encode() in splits["val"]]
    assert sum(len(text) + 1 for text in held) == manifest.tokens("val")  # whole documents
    assert not any(text.encode() in splits["train"] for text in held)


def test_a_document_of_several_shards_gives_its_tail(
    prepared: Callable[..., Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "LONG_TOKENS", 1000)
    monkeypatch.setattr(local, "LONG_BYTES", 600)
    monkeypatch.setattr(local, "BLOCK_BYTES", 300)
    text = words(950)
    manifest, splits = prepared([text], 200, one_file=True, shard_tokens=1000)
    assert len([shard for shard in manifest.shards if shard.split == "train"]) > 3
    assert manifest.tokens("val") == 200
    assert splits["train"] + splits["val"] == text.encode()


def test_too_much_validation_text_goes_back_to_training(
    prepared: Callable[..., Held], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the hash picks several long documents; here it is made to pick five times as much."""
    monkeypatch.setattr(layout, "VAL_MARGIN", 5)
    texts = [f"document {i} " + words(5, i) for i in range(3000)]
    manifest, splits = prepared(texts, 6000)
    assert 6000 / layout.TOLERANCE < manifest.tokens("val") < 6000 * layout.TOLERANCE
    assert sorted(splits["train"] + splits["val"]) == sorted("".join(texts).encode())
