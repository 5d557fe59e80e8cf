"""The file format of tokens on disk: one `manifest.json` and shards of uint16 in llm.c's layout.

A shard is a header of 256 int32 (20240520, version 1, number of tokens) followed by the tokens.
`<|endoftext|>` comes before each document. Shards hold whole documents, except in the layout
`lecture`, which cuts documents. The manifest lists every file with its SHA-256, so that training
can verify that it reads the tokens that were prepared.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rekindle import storage
from rekindle.data import content
from rekindle.errors import UserError
from rekindle.schema import mismatch

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
BLOCK = 2**20  # bytes per CRC-32: the SHA-256 shows whether a file differs, the CRCs show where
MANIFEST = "manifest.json"
UNFINISHED, STATE = ".progress", "state.json"  # folder of an unfinished preparation, and its state
SHARD = {
    "name": str, "split": str, "tokens": int, "documents": int, "sha256": str, "crc32?": str,
}  # fmt: skip
SCHEMA = {
    "tokenizer": str, "tokenizer_sha256": str, "vocab_size": range(1, 2**16 + 1), "source": dict,
    "shards": [SHARD],
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One file of a set, as the manifest describes it."""

    name: str
    split: str  # "train" or "val"
    tokens: int
    documents: int
    sha256: str
    crc32: str = ""  # of each `BLOCK` of the file, 8 hexadecimal digits each; empty if unknown


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards, and their source."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    source: dict[str, Any]  # name, revision, licence, ...
    shards: tuple[Shard, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens, independent of the folder's location. SHA-256 as hex."""
        lines = [self.tokenizer_sha256, *(f"{s.split} {s.sha256}" for s in self.shards)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def split(self, name: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == name]

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.split(split))

    def summary(self) -> str:
        """Token, document and shard counts in one line."""
        documents = sum(shard.documents for shard in self.shards)
        return (
            f"{self.tokens('train'):,} tokens to train on and {self.tokens('val'):,} for "
            f"validation, {documents:,} documents, {len(self.shards)} shards"
        )

    def write(self, folder: Path) -> None:
        contents = {"format": 1, **asdict(self)}
        storage.write_json(folder / MANIFEST, {**contents, "sha256": _own_sha256(contents)})


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`. Raises `UserError` if it is missing or malformed."""
    if not folder.is_dir():
        raise UserError(f"there is no data folder {folder}: create it with `rekindle prepare`")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} has no {MANIFEST}: finish `rekindle prepare --out {folder}` first "
            "(for shards made elsewhere: `rekindle prepare --shards`)"
        )
    try:
        raw = storage.read_json(path, {"format": int, "sha256?": str})
        own = raw.pop("sha256", None)  # missing in manifests of version 0.1
        if own is not None and own != _own_sha256(raw):
            raise ValueError("its contents do not match their SHA-256")
        if raw.pop("format") != 1:
            raise UserError(f"{path} has a newer format: update Rekindle")
        if wrong := mismatch(raw, SCHEMA):
            raise ValueError(wrong)
        shards = tuple(Shard(**entry) for entry in raw.pop("shards"))
        manifest = Manifest(**raw, shards=shards)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a shard manifest ({error}): prepare again") from None
    for shard in shards:
        if not is_name(shard.name) or shard.split not in ("train", "val"):
            raise UserError(
                f"{path} names {shard.name!r}, which is not a shard in this folder: prepare again"
            )
    return manifest


def _own_sha256(contents: dict[str, Any]) -> str:
    """The hash of a manifest's contents, by which a changed one is noticed."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def is_name(name: str) -> bool:
    """Whether `name` is a plain file name, which cannot refer to anything outside its folder."""
    return Path(name).name == name and name[:1] not in ("", ".") and "\0" not in name


def write_shard(
    path: Path, pieces: Iterable[np.ndarray], split: str = "train", documents: int = 0
) -> Shard:
    """Write tokens (in order) as one shard; return its manifest entry.

    Raises `UserError` if an id does not fit in 16 bits.
    """
    pieces = [_as_ids(piece, path) for piece in pieces]
    count = sum(map(len, pieces))
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, count
    chunks = [header, *pieces]
    sha256 = storage.write_file(path, chunks)
    return Shard(path.name, split, count, documents, sha256, block_sums(chunks))


def _as_ids(tokens: np.ndarray, path: Path) -> np.ndarray:
    """Tokens in the file's type, little-endian uint16. Other types are checked first, because NumPy
    would silently wrap an id of 65,536 to 0."""
    if tokens.dtype != np.uint16 and len(tokens):
        for extreme in (int(tokens.min()), int(tokens.max())):
            if not 0 <= extreme < 2**16:
                raise UserError(f"{path}: the id {extreme} does not fit in 16 bits")
    return np.ascontiguousarray(tokens, dtype="<u2")


def block_sums(chunks: Iterable[Any]) -> str:
    """The CRC-32 of each `BLOCK` of the bytes in `chunks`, concatenated as hex."""
    sums, room = [0], BLOCK
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            if not room:
                sums.append(0)
                room = BLOCK
            sums[-1] = zlib.crc32(rest[:room], sums[-1])
            used = min(room, len(rest))
            rest, room = rest[used:], room - used
    return "".join(f"{crc:08x}" for crc in sums)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped: (count,) uint16. Raises `UserError` if the header or
    the length is wrong; `verify` checks the content."""
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    except FileNotFoundError:
        raise UserError(f"the shard {path} is missing: run `rekindle prepare` again") from None
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read ({error.strerror})") from None
    if len(header) < HEADER_BYTES // 4 or tuple(header[:2]) != (MAGIC, VERSION):
        kind = content.kind_of(header.tobytes())
        if kind == content.LFS:
            raise UserError(f"{path} is {content.describe(kind)}")
        raise UserError(f"{path} does not start with the header of a token shard: prepare it again")
    count = int(header[2])
    if size != HEADER_BYTES + 2 * count:
        raise UserError(
            f"{path} has {size} bytes, but its header says {HEADER_BYTES + 2 * count}: it is "
            "damaged or truncated; prepare it again"
        )
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(count,))


def open_split(folder: Path, manifest: Manifest, split: str) -> list[np.ndarray]:
    """Memory-map the shards of one split, in the manifest's order."""
    return [open_shard(folder / shard.name) for shard in manifest.split(split)]


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` unless every shard exists with its full length. `verify` also checks the
    content."""
    for shard in manifest.shards:
        path = folder / shard.name
        if (count := len(open_shard(path))) != shard.tokens:
            raise UserError(
                f"{path} has {count} tokens, but its manifest says {shard.tokens}: prepare it again"
            )


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every shard once, on all cores, and compare its hash with the manifest and its ids with
    the vocabulary. Raises `UserError` that names the damaged file."""

    def check(shard: Shard) -> None:
        path = folder / shard.name
        tokens = open_shard(path)
        if len(tokens) != shard.tokens:
            raise UserError(
                f"{path} has {len(tokens)} tokens, but its manifest says {shard.tokens}: "
                "prepare it again"
            )
        check_ids(tokens, manifest.vocab_size, path)
        if storage.file_sha256(path) != shard.sha256:
            where = _first_difference(path, shard)
            raise UserError(
                f"{path} has changed since it was prepared (its SHA-256 differs{where}): "
                "prepare it again"
            )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, manifest.shards))


def _first_difference(path: Path, shard: Shard) -> str:
    """Where a file first differs from the CRC-32s in its entry, in words; empty if unknown."""
    now = block_sums([path.read_bytes()])
    for start in range(0, len(now), 8):
        if shard.crc32[start : start + 8] not in ("", now[start : start + 8]):
            first = start // 8 * BLOCK
            return f", first between bytes {first:,} and {first + BLOCK:,}"
    return ""


class Unchanged:
    """Detects whether the files of a set of shards have changed since this object was created."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._before = {
            path: _identity(path) for path in (folder / s.name for s in manifest.shards)
        }

    def check(self) -> None:
        """Raise `UserError` if a file was changed, replaced or removed."""
        for path, before in self._before.items():
            if _identity(path) != before:
                raise UserError(
                    f"{path} changed while the run was reading it: make sure that nothing writes "
                    "to it, then run the same command again, which checks every hash and resumes"
                )


def _identity(path: Path) -> tuple[int, ...] | None:
    """Inode, size and modification time, which change when a file is written or replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def describe_shard(path: Path, split: str, end_of_text: int, vocab_size: int) -> Shard:
    """The manifest entry for a shard from elsewhere. Raises `UserError` if it is not valid."""
    tokens = open_shard(path)
    check_ids(tokens, vocab_size, path)
    documents = int(np.count_nonzero(tokens == end_of_text))
    content = np.memmap(path, np.uint8, "r")
    return Shard(
        path.name, split, len(tokens), documents, storage.file_sha256(path), block_sums([content])
    )


def check_ids(
    tokens: np.ndarray, vocab_size: int, where: object, first: int = 0, note: str = ""
) -> None:
    """Raise `UserError`, with the position, if `tokens` contains an id outside the vocabulary.
    `tokens` starts at token `first` of the file `where`."""
    if tokens.max(initial=0) >= vocab_size:
        position = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where} contains the id {tokens[position]}, outside the vocabulary of {vocab_size} "
            f"(first at token {first + position}){note}: prepare it again"
        )
