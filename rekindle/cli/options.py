"""The arguments of each command: names, types, defaults and help. Imports no torch.

Other flags are defined elsewhere: the recipe, machine, sources and tasks of `train`, the sources of
`prepare`, and the tasks of `eval`.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from rekindle.flags import argument, flag
from rekindle.machine import DEVICE, PRECISION

MODEL = (
    "a run folder, a checkpoint, a folder in Hugging Face's layout, or gpt2, gpt2-medium, "
    "gpt2-large or gpt2-xl from the Hugging Face Hub; a local folder of that name takes precedence"
)
SHARDS = "folder with the shards"
JSON = "print the result as one JSON object"


@dataclass(frozen=True)
class Demo:
    data: Path = flag(Path("data/demo"), SHARDS, "DIR")
    out: Path = flag(Path("runs/demo"), "run folder", "DIR")
    steps: int | None = flag(None, "optimizer steps (default: as many as fit in about 2 minutes)")
    device: str = flag("auto", DEVICE, "NAME")


@dataclass(frozen=True)
class Prepare:
    dataset: str | None = argument(
        "a dataset on the Hugging Face Hub: fineweb-edu-10bt, fineweb-10bt, "
        "fineweb-10bt-tokenized, OWNER/NAME or OWNER/NAME:FOLDER",
        "DATASET",
        None,
    )
    out: Path | None = flag(None, "folder for the shards and the manifest", "DIR")
    tokenizer: str = flag("gpt2", "gpt2, or bytes (for tiny models)", "NAME")
    layout: str = flag(
        "documents",
        "documents: shards hold complete documents, and a hash of each document decides whether it "
        "is for validation; lecture: one stream of tokens in the source's order, cut into shards "
        "of equal size as in the lecture, the first of them for validation",
        "NAME",
        choices=("documents", "lecture"),
    )
    val_tokens: int | None = flag(
        None,
        "approximate number of tokens to hold out for validation, unless file names or the layout "
        "determine the split (default: 10485760)",
    )
    shard_tokens: int = flag(
        100_000_000,
        "tokens per shard; with --layout documents, a shard ends with a complete document",
    )


@dataclass(frozen=True)
class Train:
    recipe: str = argument("one of the recipes below, or a recipe file (.toml)", "RECIPE")
    out: Path = flag(MISSING, "run folder", "DIR")
    data: Path | None = flag(
        None, "folder with the shards (default if a source of text is given: OUT/data)", "DIR"
    )
    fork: Path | None = flag(
        None,
        "start from another run's or checkpoint's weights, optimizer state and step",
        "RUN",
    )
    dry_run: bool = flag(
        False,
        "print the resolved configuration, tokens, memory and warnings without writing anything",
    )
    log_every: int = flag(0, "steps between printed lines; 0: one line every ten seconds")
    timeout: float = flag(
        600.0,
        "seconds that a rank waits for the others before it reports the missing rank and exits; "
        "0: no limit",
        "S",
    )


@dataclass(frozen=True)
class Eval:
    model: str = argument(MODEL, "RUN_OR_MODEL")
    data: Path | None = flag(None, "shards to score (default: those the run was trained on)", "DIR")
    tokens: int | None = flag(
        None,
        "validation tokens to score at most (default: as in training; 10485760 for other models)",
    )
    limit: int | None = flag(None, "score only the first N questions of each task (default: all)")
    device: str = flag("auto", DEVICE, "NAME")
    precision: str = flag("auto", PRECISION, "NAME")
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Sample:
    model: str = argument(MODEL, "RUN_OR_MODEL")
    prompt: str = flag("Hello, I'm a language model,", "text to continue")
    tokens: int = flag(32, "tokens to generate")
    num: int = flag(4, "number of samples")
    seed: int = flag(42, "random seed")
    temperature: float = flag(1.0, "sampling temperature; 0: always the most likely token")
    top_k: int = flag(50, "sample from the K most likely tokens; 0: all", "K")
    device: str = flag("auto", DEVICE, "NAME")
    precision: str = flag("auto", PRECISION, "NAME")
    compile: bool = flag(False, "compile the decoding step, which pays off only for long texts")
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Verify:
    model: str = argument(MODEL, "RUN_OR_MODEL")
    random_weights: bool = flag(
        False, "use random weights in a model of this size, which needs no network"
    )
    layers: int | None = flag(None, "with --random-weights: number of blocks (default: all)")
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Check:
    runs: list[str] = argument("run folders, or gpt2 for OpenAI's weights", "RUN")
    data: Path | None = flag(
        None,
        "the runs' shards, if they have moved; for gpt2, FineWeb-Edu in the lecture's layout "
        "(default for gpt2: download its first file)",
        "DIR",
    )
    hellaswag: str = flag("hub", "for gpt2: HellaSwag from this file, or `hub`", "FILE")
    price_per_hour: float | None = flag(
        None, "price of an hour on the training machine, to print what the run cost"
    )
    device: str = flag("auto", DEVICE, "NAME")
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Ladder:
    data: Path | None = flag(None, "folder with shards (default: Python's documentation)", "DIR")
    out: Path = flag(Path("runs/ladder"), "folder for ladder.json and ladder.png", "DIR")
    recipe: str | None = flag(
        None, "recipe to measure (default: gpt2-124m on a GPU, else gpt2-10m)", "RECIPE"
    )
    steps: int = flag(20, "measured steps per rung")
    device: str = flag("auto", DEVICE, "NAME")


@dataclass(frozen=True)
class Report:
    run: Path = argument("a run folder", "RUN")
    picture: Path | None = flag(None, "image file to write (default: RUN/loss.png)", "FILE")
