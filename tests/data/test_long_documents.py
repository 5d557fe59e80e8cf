"""A document may be longer than memory, a block or a shard, and still get the same tokens."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rekindle.data import encoding, layout, shards
from rekindle.data.encoding import is_validation
from rekindle.data.prepare import prepare
from rekindle.data.sources import local
from rekindle.data.tokenizer import get_tokenizer
from rekindle.errors import UserError
from rekindle.observe.console import Console
from tests.data.naming import source_of

BLOCK = 700  # bytes, so small that short texts count as long documents
KINDS = {"text": ".txt", "jsonl": ".jsonl", "parquet": ".parquet"}


def prose(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    some = [
        "the",
        "of",
        "it's",
        "3.14",
        "東京",
        "Ünïcode",
        "🙂",
        "\n\n",
        "  ",
        "(x)",
        "don't,",
        ".",
    ]
    return " ".join(rng.choices(some, k=words)).strip()


TEXTS = {
    "English": "Once upon a midnight dreary, while I pondered, weak and weary. " * 60,
    "mixed": prose(900),
    "no spaces": "".join(random.Random(1).choices("abc.,;(){}=1'", k=4000)),
    "Chinese": "千里之行，始于足下。知者不言" * 120,
    "lines": "\r\n".join(prose(3, seed) for seed in range(200)),
    "letters": prose(2000).replace(" ", ""),
}


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_bytes("<|endoftext|>".join(texts).encode())
    return path


def run(source: Any, out: Path, **settings: Any) -> shards.Manifest:
    chosen: dict[str, Any] = {"console": Console(quiet=True)} | settings
    return prepare(source, out, **chosen)


def tokens_of(out: Path, split: str = "train") -> list[int]:
    parts = shards.open_split(out, shards.read_manifest(out), split)
    return np.concatenate(parts).tolist() if parts else []


def expected(texts: list[str], tokenizer: str = "gpt2") -> list[int]:
    one = get_tokenizer(tokenizer)
    return [token for text in texts for token in [one.end_of_text, *one.encode(text)]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use blocks of 700 bytes, and cut documents that fill shards of 500 tokens."""
    monkeypatch.setattr(local, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(local, "PART_BYTES", BLOCK, raising=False)
    monkeypatch.setattr(local, "LONG_BYTES", 3 * BLOCK, raising=False)
    monkeypatch.setattr(layout, "LONG_TOKENS", 500, raising=False)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size in bytes of each block that is encoded."""
    sizes: list[int] = []
    encode = encoding._encode

    def watching(block: Any, *more: Any) -> Any:
        sizes.append(sum(len(text.encode()) for text in block.texts.to_pylist()))
        return encode(block, *more)

    monkeypatch.setattr(encoding, "_encode", watching)
    return sizes


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_encoding_in_parts_gives_the_reference_tokens(
    tmp_path: Path, kind: str, name: str, watched: list[int]
) -> None:
    texts = ["short one", TEXTS[name], "another", TEXTS[name][5:-5] + "x", TEXTS[name]]
    path = write(tmp_path / f"a{KINDS[kind]}", texts)
    out = tmp_path / "out"
    manifest = run(source_of(kind, [path]), out, val_tokens=0, shard_tokens=1000)
    assert tokens_of(out) == expected(texts)
    assert sum(shard.documents for shard in manifest.shards) == 5
    assert max(watched) < 4 * BLOCK
    for shard in manifest.shards:
        found = np.count_nonzero(shards.open_shard(out / shard.name) == 50256)
        assert (shard.documents, shard.tokens < 3000) == (found, True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("layout", ["documents", "lecture"])
@pytest.mark.parametrize("kind", KINDS)
def test_long_documents_are_resumed(
    tmp_path: Path, kind: str, layout: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a document, with the same bytes as without a stop."""
    texts = [prose(400 * (i % 3) + 30, seed=i) for i in range(7)]
    path = write(tmp_path / f"a{KINDS[kind]}", texts)
    settings = {"shard_tokens": 300, "layout": layout, "tokenizer": tokenizer}
    settings |= {"val_tokens": 300} if layout == "documents" else {}
    run(source_of(kind, [path]), tmp_path / "complete", **settings)
    encode, calls = encoding._encode, 0
    complete = {p.name: p.read_bytes() for p in (tmp_path / "complete").glob("*.*")}
    assert len(complete) > 8
    if layout == "lecture":
        everything = tokens_of(tmp_path / "complete", "val") + tokens_of(tmp_path / "complete")
        assert everything == expected(texts, tokenizer)

    def stops(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(encoding, "_encode", stops)
    monkeypatch.setattr(encoding, "usable_cores", lambda: 1)
    for stop in (3, 6, 9, 12):
        calls = 0
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            run(source_of(kind, [path]), out, **settings)
        calls = -1000
        run(source_of(kind, [path]), out, **settings)
        assert {p.name: p.read_bytes() for p in out.glob("*.*")} == complete


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
def test_long_document_keeps_its_split(tmp_path: Path, kind: str) -> None:
    """A document that is encoded in parts is assigned by the hash of its whole text. A document too
    long for memory becomes training data."""
    texts = [prose(200 + i, seed=i) for i in range(60)]
    assert all(BLOCK < len(text.encode()) < 3 * BLOCK for text in texts)
    path = write(tmp_path / f"a{KINDS[kind]}", texts)
    run(source_of(kind, [path]), tmp_path / "out", val_tokens=10**9)
    mask = is_validation(pa.array(texts), 0.1)
    assert 2 < mask.sum() < 15
    assert tokens_of(tmp_path / "out", "val") == expected(
        [text for text, held in zip(texts, mask, strict=True) if held]
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
def test_document_too_long_for_memory_is_training_data(tmp_path: Path, kind: str) -> None:
    texts = [prose(1500, seed) for seed in range(60)]
    held = np.flatnonzero(is_validation(pa.array(texts), 0.1))[:3]  # if they were short
    assert len(held) == 3
    for i in held:
        path = write(tmp_path / f"{i}{KINDS[kind]}", [texts[i], "a short one"])
        manifest = run(source_of(kind, [path]), tmp_path / f"{kind}{i}", shard_tokens=400)
        assert manifest.tokens("train") > 1500
        assert max(s.tokens for s in manifest.shards) < 1000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["a", "東", " ", "\n", "7"])
def test_very_long_word_is_rejected(
    tmp_path: Path, kind: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that cannot be cut is encoded as a whole, up to a limit."""
    monkeypatch.setattr(encoding, "LONGEST_WORD", 9000, raising=False)
    path = write(tmp_path / f"a{KINDS[kind]}", [f"Some text, {word * 2800} and more."])
    run(source_of(kind, [path]), tmp_path / "fits", val_tokens=0)
    assert tokens_of(tmp_path / "fits") == expected([f"Some text, {word * 2800} and more."])
    path = write(tmp_path / f"b{KINDS[kind]}", ["Some text, ", f"then {word * 12000} and more."])
    with pytest.raises(UserError, match=rf"b{KINDS[kind]}.*document 2.*9,000 bytes.*without"):
        run(source_of(kind, [path]), tmp_path / "out", val_tokens=0)
    run(source_of(kind, [path]), tmp_path / "bytes", tokenizer="bytes", val_tokens=0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("at", [0, 650, 701, 5000])
def test_long_text_that_is_not_utf8_is_reported(tmp_path: Path, at: int) -> None:
    text = "é".encode() * 4000
    start = at - at % 2  # of the damaged or truncated character
    for damaged in (text[:at] + b"\xff" + text[at:], text[: start + 1]):
        (tmp_path / "a.txt").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 text \(byte {start}:"):
            run(source_of("text", [tmp_path / "a.txt"]), tmp_path / "out")


MEASURED = """
import resource, sys
from pathlib import Path
from rekindle.data import encoding, layout
from rekindle.data.prepare import prepare
from rekindle.data.sources import from_arguments, local
from rekindle.observe.console import Console

encoding.usable_cores = lambda: 2
local.BLOCK_BYTES = local.PART_BYTES = 1 << 20
local.LONG_BYTES, layout.LONG_TOKENS = 4 << 20, 1 << 20
for name in sys.argv[2:]:
    source = from_arguments(text=[Path(sys.argv[1], name)])
    out = Path(sys.argv[1], f"out-{name}")
    prepare(source, out, "bytes", shard_tokens=1 << 20, console=Console(quiet=True))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_a_document(tmp_path: Path) -> None:
    """60 MB need no more memory than 10 MB, apart from memory that allocators keep."""
    line = b"What a long tale this is, with a good many words, read slowly by the fire.\n"
    (tmp_path / "a.txt").write_bytes(line * (10_000_000 // len(line)))
    (tmp_path / "b.txt").write_bytes(line * (60_000_000 // len(line)))
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path, "a.txt", "b.txt"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    short, long = map(int, done.stdout.split())
    assert long < short + 30


@pytest.mark.parametrize("how", ["categories", "dictionary", "prefixes"])
def test_parquet_that_decodes_to_far_more_than_its_size(tmp_path: Path, how: str) -> None:
    """Only a few rows are read at a time, regardless of the size on disk."""
    texts = pa.array([f"{'The licence says this once more. ' * 3000}{i % 3}" for i in range(4000)])
    more: dict[str, Any] = {}
    if how == "prefixes":
        more = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    path = tmp_path / "a.parquet"
    column = texts.dictionary_encode() if how == "categories" else texts
    pq.write_table(pa.table({"text": column}), path, **more)
    assert path.stat().st_size < 10_000_000 < texts.nbytes / 30
    del texts, column
    before = pa.total_allocated_bytes()
    most, count = 0, 0
    for block in source_of("parquet", [path]).blocks(0):
        most = max(most, pa.total_allocated_bytes() - before)
        count += len(block.texts)
    assert count == 4000
    assert most < 80_000_000


def test_many_small_documents_make_full_blocks(
    tmp_path: Path, texts: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a few rows at a time does not lead to small encoding tasks."""
    monkeypatch.setattr(local, "BLOCK_BYTES", 60_000)
    documents = texts(3000)
    path = write(tmp_path / "a.parquet", documents)
    blocks = list(source_of("parquet", [path]).blocks(0))
    assert [text for block in blocks for text in block.texts.to_pylist()] == documents
    assert all(block.texts.nbytes > 30_000 for block in blocks[:-1])
