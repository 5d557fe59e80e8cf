"""The arguments of each command: name, type, default and help of every one. Imports no torch.

`train` also offers the numbers of its recipe, the machine, sources of text and tasks; `prepare` the
sources; `eval` the tasks. These stand where they are defined.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from rekindle.flags import argument, flag
from rekindle.machine import DEVICE, PRECISION

MODEL = (
    "a run folder, a checkpoint, a folder in Hugging Face's layout, or gpt2, gpt2-medium, "
    "gpt2-large or gpt2-xl from the hub; a local folder of that name takes precedence"
)
SHARDS = "folder with the shards"
JSON = "print one JSON object"


@dataclass(frozen=True)
class Demo:
    data: Path = flag(Path("data/demo"), SHARDS, "DIR")
    out: Path = flag(Path("runs/demo"), "folder of the run", "DIR")
    steps: int | None = flag(None, "optimizer steps (default: as many as take about 2 minutes)")
    device: str = flag("auto", DEVICE, "NAME")


@dataclass(frozen=True)
class Prepare:
    dataset: str | None = argument(
        "a dataset of the hub: fineweb-edu-10bt, fineweb-10bt, fineweb-10bt-tokenized, OWNER/NAME "
        "or OWNER/NAME:FOLDER",
        "DATASET",
        None,
    )
    out: Path | None = flag(None, "folder for the shards and the manifest", "DIR")
    tokenizer: str = flag("gpt2", "gpt2, or bytes for tiny models", "NAME")
    layout: str = flag(
        "documents",
        "documents: whole documents, validation chosen by a hash of each; lecture: as the "
        "lecture's script cuts them, in the source's order and through documents, the first shard "
        "for validation",
        "NAME",
        choices=("documents", "lecture"),
    )
    val_tokens: int | None = flag(
        None,
        "about how many tokens to hold out for validation, unless file names or the layout decide "
        "(default: 10485760)",
    )
    shard_tokens: int = flag(
        100_000_000, "tokens per shard; with the layout documents, the last document completes it"
    )


@dataclass(frozen=True)
class Train:
    recipe: str = argument("one of the recipes below, or a recipe file (.toml)", "RECIPE")
    out: Path = flag(MISSING, "folder of the run", "DIR")
    data: Path | None = flag(
        None, "folder with the shards (default with a source of text: OUT/data)", "DIR"
    )
    fork: Path | None = flag(
        None,
        "start from another run's or checkpoint's weights, optimizer state and step",
        "RUN",
    )
    dry_run: bool = flag(
        False, "print the resolved configuration, tokens, memory and warnings, and write nothing"
    )
    log_every: int = flag(0, "steps between printed lines; 0: one every ten seconds")
    timeout: float = flag(
        600.0,
        "seconds that a rank waits for the others before it names the one that is missing and "
        "exits; 0: no limit",
        "S",
    )


@dataclass(frozen=True)
class Eval:
    model: str = argument(MODEL, "RUN_OR_MODEL")
    data: Path | None = flag(None, "shards to score (default: the run's own)", "DIR")
    tokens: int | None = flag(None, "validation tokens to score at most (default: all)")
    limit: int | None = flag(None, "score only the first N questions of a task (default: all)")
    device: str = flag("auto", DEVICE, "NAME")
    precision: str = flag("auto", PRECISION, "NAME")
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Sample:
    model: str = argument(MODEL, "RUN_OR_MODEL")
    prompt: str = flag("Hello, I'm a language model,", "text to continue")
    tokens: int = flag(32, "tokens to add")
    num: int = flag(4, "number of samples")
    seed: int = flag(42, "seed of the random numbers")
    temperature: float = flag(1.0, "0: always the most likely token")
    top_k: int = flag(50, "choose among the K most likely tokens; 0: all", "K")
    device: str = flag("auto", DEVICE, "NAME")
    precision: str = flag("auto", PRECISION, "NAME")
    compile: bool = flag(
        False, "compile the decoding step; worth its start-up time for long texts only"
    )
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Verify:
    model: str = argument(MODEL, "RUN_OR_MODEL")
    random_weights: bool = flag(False, "random weights in a model of that size: needs no network")
    layers: int | None = flag(None, "with --random-weights: number of blocks (default: all)")
    json: bool = flag(False, JSON)


@dataclass(frozen=True)
class Ladder:
    data: Path | None = flag(None, "folder with shards (default: Python's own manual)", "DIR")
    out: Path = flag(Path("runs/ladder"), "folder for the table and the picture", "DIR")
    recipe: str | None = flag(
        None, "recipe to time (default: gpt2-124m on a GPU, else gpt2-10m)", "RECIPE"
    )
    steps: int = flag(20, "timed steps per rung")
    device: str = flag("auto", DEVICE, "NAME")


@dataclass(frozen=True)
class Report:
    run: Path = argument("a run folder", "RUN")
    picture: Path | None = flag(None, "file to write (default: RUN/loss.png)", "FILE")
