"""Compare OpenAI's GPT-2 124M with its published scores, to check our own evaluation."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rekindle import hub
from rekindle.check import bands
from rekindle.check.judge import interval
from rekindle.check.report import Part, Row
from rekindle.data import shards
from rekindle.data.shards import Manifest
from rekindle.data.sources.hub import DATASETS
from rekindle.data.sources.parquet import parquet_blocks
from rekindle.data.tokenizer import get_tokenizer
from rekindle.evaluate.command import evaluate_model
from rekindle.observe.console import Console

INSTEAD = "where there is no network, prepare it elsewhere and use --data DIR"


def measure(
    model: str, data: Path | None, tasks: dict[str, str], device: str, console: Console
) -> dict[str, Any]:
    """Evaluate a run or model, with its loss over the number of tokens that the bands are for."""
    return evaluate_model(
        model,
        data=data,
        tasks=tasks,
        tokens=bands.FINAL_TOKENS,
        limit=None,
        device=device,
        precision="auto",
        console=console,
        note=console.print,
    )


def check_gpt2(data: Path | None, hellaswag: str, device: str, console: Console) -> Part:
    """Evaluate the weights from the Hugging Face Hub. `data`: FineWeb-Edu as `--layout lecture`
    prepares it; None: download its first file. Raises `UserError` if a download fails."""
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            repository, below = DATASETS["fineweb-edu-10bt"]
            listing = hub.list_files(repository, below, ".parquet", None, INSTEAD)
            path = hub.download(
                repository,
                listing.files[0].path,
                instead=INSTEAD,
                kind="dataset",
                revision=listing.revision,
            )
            data = Path(folder)
            write_beginning(path, data, bands.FINAL_TOKENS + 1)
        return judge_gpt2(measure("gpt2", data, {"hellaswag": hellaswag}, device, console))


def judge_gpt2(measured: dict[str, Any]) -> Part:
    """Compare scores, as `measure` returns them, with the bands."""
    loss, tokens = measured["validation"]["loss"], measured["validation"]["tokens"]
    score, total = measured["hellaswag"]["acc_norm"], measured["hellaswag"]["total"]
    rows = (
        Row("validation tokens", f"{tokens:,}", f"{bands.FINAL_TOKENS:,}",
            tokens == bands.FINAL_TOKENS),
        Row("loss on FineWeb-Edu", f"{loss:.4f}", f"{bands.GPT2_LOSS} ± {bands.GPT2_LOSS_BAND}",
            abs(loss - bands.GPT2_LOSS) <= bands.GPT2_LOSS_BAND),
        Row("HellaSwag", f"{score:.4f} ± {interval(score, total):.4f}, {total:,} questions",
            f"{bands.GPT2_HELLASWAG} ± {bands.GPT2_HELLASWAG_BAND}",
            abs(score - bands.GPT2_HELLASWAG) <= bands.GPT2_HELLASWAG_BAND),
    )  # fmt: skip
    return Part("OpenAI's GPT-2 124M", rows)


def write_beginning(parquet: Path, out: Path, count: int) -> None:
    """Write a validation shard with the first `count` tokens of a Parquet file, which are also the
    first of the lecture's validation shard, and a manifest to the folder `out`."""
    tokenizer = get_tokenizer("gpt2")
    pieces: list[np.ndarray] = []
    for document in _documents(parquet):
        if sum(map(len, pieces)) >= count:
            break
        pieces.append(np.array([tokenizer.end_of_text, *tokenizer.encode(document)], np.uint16))
    tokens = np.concatenate(pieces)[:count]
    shard = shards.write_shard(out / "val-0000.bin", [tokens], "val")
    source = {"name": "the beginning of FineWeb-Edu"}
    known = (tokenizer.name, tokenizer.sha256, tokenizer.vocab_size)
    Manifest(*known, source, (shard,)).write(out)


def _documents(parquet: Path) -> Iterator[str]:
    for block in parquet_blocks(parquet, 0, 0):
        yield from block.texts.to_pylist()
