"""Shards and manifests round-trip, and damage is reported."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from rekindle.data import shards
from rekindle.data.shards import BLOCK, Manifest
from rekindle.errors import UserError

TOKENS = np.array([256, 1, 2, 3, 256, 4], np.uint16)
SHA256 = "2ea71d02f83abe43de4a79995ad8a369cb009501557ea7d66902bf7d097b039f"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder with one train and one validation shard."""
    entries = []
    for split, tokens in (("train", TOKENS), ("val", TOKENS[:4])):
        entries.append(shards.write_shard(tmp_path / f"{split}_000000.bin", [tokens], split, 1))
    Manifest("bytes", "abc", 257, {"name": "test"}, tuple(entries)).write(tmp_path)
    return tmp_path


def test_format_matches_llmc(tmp_path: Path) -> None:
    """256 int32 that start with 20240520, 1, count; then uint16 tokens, all little-endian."""
    shards.write_shard(tmp_path / "s.bin", [TOKENS[:2], TOKENS[2:]])
    content = (tmp_path / "s.bin").read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 6]
    assert not header[3:].any()
    assert np.frombuffer(content[1024:], "<u2").tolist() == TOKENS.tolist()


def test_bytes_of_a_shard_never_change(tmp_path: Path) -> None:
    """Manifests contain the hash, so preparing the same data again must give the same bytes."""
    shard = shards.write_shard(tmp_path / "s.bin", [TOKENS], "train", 2)
    assert shard.sha256 == SHA256
    assert shard.sha256 == hashlib.sha256((tmp_path / "s.bin").read_bytes()).hexdigest()
    assert (shard.split, shard.tokens, shard.documents) == ("train", 6, 2)


@pytest.mark.parametrize("bad", [2**16, 2**16 + 5, 2**32, -1])
def test_id_that_does_not_fit_is_rejected_not_wrapped(tmp_path: Path, bad: int) -> None:
    for position in (0, 1, 2):
        ids = np.zeros(3, np.int64)
        ids[position] = bad
        with pytest.raises(UserError, match=rf"s\.bin: the id {bad} does not fit"):
            shards.write_shard(tmp_path / "s.bin", [TOKENS, ids])
    assert not list(tmp_path.iterdir())
    largest = np.array([2**16 - 1, 0], np.int64)
    shards.write_shard(tmp_path / "s.bin", [largest, largest[:0]])
    assert shards.open_shard(tmp_path / "s.bin").tolist() == [65_535, 0]


def test_shards_round_trip(folder: Path) -> None:
    manifest = shards.read_manifest(folder)
    shards.verify(folder, manifest)
    shards.check_sizes(folder, manifest)
    assert shards.open_split(folder, manifest, "train")[0].tolist() == TOKENS.tolist()
    assert manifest.tokens("train") == 6
    assert manifest.tokens("val") == 4
    assert "6 tokens to train on and 4 for validation" in manifest.summary()


def test_fingerprint_depends_only_on_the_tokens(folder: Path, tmp_path: Path) -> None:
    manifest = shards.read_manifest(folder)
    renamed = Manifest("bytes", "abc", 257, {"name": "elsewhere"}, manifest.shards)
    other = Manifest("bytes", "abd", 257, {"name": "test"}, manifest.shards)
    assert renamed.fingerprint == manifest.fingerprint != other.fingerprint


def damage(path: Path, position: int, value: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(value)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"\0", "header"),  # not the magic number
        (4, b"\x02", "header"),  # another version
        (8, b"\x09", "its header says"),  # a count that does not match the length
        (1026, b"\x09", "SHA-256 differs, first between bytes 0 and 1,048,576"),  # one token
        (1026, b"\xff\xff", "vocabulary of 257"),  # one id that does not exist
    ],
)
def test_changed_byte_is_detected(folder: Path, position: int, value: bytes, message: str) -> None:
    manifest = shards.read_manifest(folder)
    damage(folder / "train_000000.bin", position, value)
    with pytest.raises(UserError, match=message) as caught:
        shards.verify(folder, manifest)
    assert "train_000000.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [1024, BLOCK - 1, BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1])
def test_flipped_byte_is_located_to_its_block(tmp_path: Path, position: int) -> None:
    """In a file of exactly three blocks, written in pieces not aligned to blocks."""
    tokens = np.zeros((3 * BLOCK - shards.HEADER_BYTES) // 2, np.uint16)
    path = tmp_path / "train.bin"
    entry = shards.write_shard(path, np.split(tokens, [1, 400_000, 10**6]))
    assert entry.crc32 == "".join(
        f"{zlib.crc32(path.read_bytes()[start : start + BLOCK]):08x}"
        for start in range(0, 3 * BLOCK, BLOCK)
    )
    described = shards.describe_shard(path, "train", 256, 257)
    assert (described.sha256, described.crc32) == (entry.sha256, entry.crc32)
    manifest = Manifest("bytes", "abc", 257, {"name": "test"}, (entry,))
    shards.verify(tmp_path, manifest)
    damage(path, position, b"\x01")  # an id of 1 or 256
    first = position // BLOCK * BLOCK
    with pytest.raises(UserError, match=f"between bytes {first:,} and {first + BLOCK:,}"):
        shards.verify(tmp_path, manifest)


def test_manifest_without_crc32s_is_accepted(folder: Path) -> None:
    """Older manifests have no CRCs; the hash is still checked."""
    raw = json.loads((folder / "manifest.json").read_text())
    for entry in raw["shards"]:
        del entry["crc32"]
    del raw["sha256"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    manifest = shards.read_manifest(folder)
    shards.verify(folder, manifest)
    damage(folder / "train_000000.bin", 1026, b"\x09")
    with pytest.raises(UserError, match=r"its SHA-256 differs\)"):
        shards.verify(folder, manifest)


@pytest.mark.parametrize("key", ["sha256", "crc32", "tokens", "name"])
def test_changed_character_of_a_manifest_is_detected(folder: Path, key: str) -> None:
    """Whichever key it is in; otherwise the shard, or the run's data, would be blamed."""
    path = folder / "manifest.json"
    text = path.read_text()
    start = text.index(f'"{key}": ') + len(key) + 4
    at = next(i for i in range(start, len(text)) if text[i].isalnum())
    path.write_text(f"{text[:at]}{'1' if text[at] != '1' else '2'}{text[at + 1 :]}")
    with pytest.raises(UserError, match=r"manifest\.json .*do not match their SHA-256"):
        shards.read_manifest(folder)


@pytest.mark.parametrize("length", [0, 10, 1023, 1024, 1035])
def test_truncated_shard_is_detected(folder: Path, length: int) -> None:
    path = folder / "val_000000.bin"
    path.write_bytes(path.read_bytes()[:length] if length < 1032 else path.read_bytes() + b"...")
    for check in (shards.verify, shards.check_sizes):
        with pytest.raises(UserError, match=r"val_000000\.bin"):
            check(folder, shards.read_manifest(folder))


def test_replaced_shard_is_detected(folder: Path) -> None:
    shards.write_shard(folder / "train_000000.bin", [TOKENS[:5]])
    for check in (shards.verify, shards.check_sizes):
        with pytest.raises(UserError, match="has 5 tokens"):
            check(folder, shards.read_manifest(folder))


def test_missing_shard_is_detected(folder: Path) -> None:
    (folder / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin is missing"):
        shards.verify(folder, shards.read_manifest(folder))


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        shards.read_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match="finish `rekindle prepare"):
        shards.read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "shards": [{"name": "a"}]}',
        '{"format": 1, "shards": 3}',
    ],
)
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        shards.read_manifest(folder)


@pytest.mark.parametrize("name", ["../train_000000.bin", "/etc/passwd", "a/b.bin"])
def test_manifest_may_only_list_files_in_its_folder(folder: Path, name: str) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    raw["shards"][0]["name"] = name
    del raw["sha256"]
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="not a shard in this folder"):
        shards.read_manifest(folder)


def test_shard_from_elsewhere_is_described_and_checked(folder: Path) -> None:
    path = folder / "train_000000.bin"
    entry = shards.describe_shard(path, "train", 256, 257)
    assert (entry.tokens, entry.documents) == (6, 2)
    assert entry.sha256 == shards.read_manifest(folder).shards[0].sha256
    with pytest.raises(UserError, match="the id 256, outside the vocabulary of 256"):
        shards.describe_shard(path, "train", 256, 256)
