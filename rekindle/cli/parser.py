"""The subcommands and their arguments. Imports no torch, so that `--help` answers at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle import __version__, recipes
from rekindle.cli import commands as do
from rekindle.cli.arguments import add_flags
from rekindle.evaluate.tasks import TASKS
from rekindle.flags import flags_of
from rekindle.machine import MachineOptions

RUN_OR_MODEL = (
    "a run folder, a checkpoint, a folder in Hugging Face's layout, or gpt2 | gpt2-medium | "
    "gpt2-large | gpt2-xl; a folder of that name goes before the hub's model"
)


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all subcommands; `train` offers the flags of the recipe in `arguments`."""
    parser = argparse.ArgumentParser(
        prog="rekindle",
        description="GPT-2 reproduced from scratch: from text to tokens, training, evaluation and "
        "samples.",
        epilog="Start with `rekindle demo`. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"rekindle {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_prepare(commands)
    named = next((a for a in arguments if a in recipes.RECIPES), "gpt2-124m")
    _add_train(commands, recipes.RECIPES[named])
    _add_eval(commands)
    _add_sample(commands)
    _add_verify(commands)
    _add_check(commands)
    _add_ladder(commands)
    _add_report(commands)
    return parser


def _add(commands: Any, name: str, function: Any, about: str, example: str = "") -> Any:
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function, name=name)
    return parser


def _add_demo(commands: Any) -> None:
    p = _add(commands, "demo", do.demo, "the whole road in a few minutes, without a network")
    p.add_argument("--data", type=Path, default=Path("data/demo"), help="(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="(default: %(default)s)")
    p.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: about 2 min)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def _add_prepare(commands: Any) -> None:
    from rekindle.data.sources import SOURCES

    p = _add(
        commands, "prepare", do.prepare, "turn text into shards of tokens",
        "examples:\n"
        "  rekindle prepare fineweb-edu-10bt --layout lecture --out data/fineweb-edu\n"
        "  rekindle prepare fineweb-10bt-tokenized --out data/fineweb\n"
        "  rekindle prepare --parquet DIR --out data/mine\n"
        "Files or folders with the word val, valid, validation or dev in their name are held out;\n"
        "those with test or eval are left out. A folder stands for all such files below it.\n"
        "Killed or stopped, the same command resumes; when all is there, it does nothing.",
    )  # fmt: skip
    source = p.add_argument_group("where the text comes from (one of)")
    source.add_argument(
        "dataset", nargs="?",
        help="fineweb-edu-10bt, fineweb-10bt, fineweb-10bt-tokenized, or any data set of the hub "
        "as OWNER/NAME or OWNER/NAME:FOLDER",
    )  # fmt: skip
    for name, (_, options) in SOURCES.items():
        source.add_argument(f"--{name}", **options)
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the shards and manifest")
    p.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME",
        help="such as gpt2, or bytes for tiny models (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--layout", default="documents", choices=("documents", "lecture"),
        help="documents: whole documents, some held out for validation by their hash; lecture: as "
        "the lecture's script cuts them, in the source's order and through documents, the first "
        "shard for validation (default: %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--val-tokens", type=int, metavar="N",
        help="about how many tokens to hold out, if neither the source nor the layout says "
        "(default: 10485760)",
    )  # fmt: skip
    p.add_argument(
        "--shard-tokens", type=int, default=100_000_000, metavar="N",
        help="how many tokens a shard holds, and the rest of its last document unless the layout "
        "is lecture (default: %(default)s)",
    )  # fmt: skip


def _add_train(commands: Any, recipe: recipes.Recipe) -> None:
    names = "\n".join(f"  {r.name:16} {r.about}" for r in recipes.RECIPES.values())
    p = _add(
        commands, "train", do.train, "train a recipe; the same command again resumes",
        f"recipes:\n{names}\n\nexamples:\n"
        "  rekindle train gpt2-124m --data data/fineweb-edu --out runs/gpt2\n"
        "  torchrun --nproc-per-node 8 -m rekindle train gpt2-124m --data ... --out ...",
    )  # fmt: skip
    p.add_argument("recipe", metavar="RECIPE", help="one of the recipes below")
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of shards")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    p.add_argument(
        "--fork", type=Path, metavar="RUN", help="begin from another run's or checkpoint's state"
    )
    for name in TASKS:
        p.add_argument(
            f"--{name}",
            metavar="FILE",
            help=f"score {name} from this file, `hub`, or `none` (default: from the hub on a GPU)",
        )
    p.add_argument(
        "--timeout", type=float, default=600.0, metavar="S",
        help="seconds that a rank waits for the others before it says which one holds it up, and "
        "ends; 0: forever (default: %(default)s)",
    )  # fmt: skip
    add_flags(p.add_argument_group("the machine"), flags_of(MachineOptions()))
    numbers = p.add_argument_group(
        f"the numbers of the recipe (defaults are those of {recipe.name})"
    )
    add_flags(numbers, flags_of(recipe))


def _add_eval(commands: Any) -> None:
    p = _add(
        commands, "eval", do.evaluate, "validation loss and HellaSwag of a run or model",
        "examples:\n"
        "  rekindle eval runs/gpt2 --hellaswag\n"
        "  rekindle eval gpt2 --data data/fineweb-edu --json",
    )  # fmt: skip
    p.add_argument("model", metavar="RUN_OR_MODEL", help=RUN_OR_MODEL)
    p.add_argument(
        "--data", type=Path, metavar="DIR", help="shards to score (default: the run's own)"
    )
    for name in TASKS:
        p.add_argument(
            f"--{name}",
            nargs="?",
            const="hub",
            metavar="FILE",
            help=f"score {name}, from a file or else from the hub",
        )
    p.add_argument("--tokens", type=int, metavar="N", help="validation tokens to score at most")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N HellaSwag questions")
    _add_device(p)
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_sample(commands: Any) -> None:
    p = _add(commands, "sample", do.sample, "let a run or model continue a text")
    p.add_argument("model", metavar="RUN_OR_MODEL", help=RUN_OR_MODEL)
    default = "Hello, I'm a language model,"
    p.add_argument("--prompt", default=default, help="(default: %(default)s)")
    p.add_argument("--tokens", type=int, default=32, help="tokens to add (default: %(default)s)")
    p.add_argument("--num", type=int, default=4, help="texts (default: %(default)s)")
    p.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="(default: %(default)s; 0: all)")
    _add_device(p)
    p.add_argument(
        "--compile", action="store_true",
        help="compile the step from token to token, which takes longer than one short text",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_verify(commands: Any) -> None:
    p = _add(
        commands, "verify", do.verify, "compare logits, loss, text and gradients with transformers"
    )
    p.add_argument("model", metavar="RUN_OR_MODEL", help=RUN_OR_MODEL)
    p.add_argument(
        "--random-weights", action="store_true", help="a random model of that size: no network"
    )
    p.add_argument("--layers", type=int, metavar="N", help="with --random-weights: fewer blocks")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_check(commands: Any) -> None:
    p = _add(
        commands, "check", do.check, "score runs, or OpenAI's gpt2, against bands fixed beforehand",
        "The exit status is 0 if all is within the bands, or an unfinished run should continue; 1\n"
        "if not. Bands are those of gpt2-124m on FineWeb-Edu and gpt2-124m-fast on FineWeb.\n"
        "examples:\n"
        "  rekindle check runs/gpt2 --price-per-hour 24\n"
        "  rekindle check gpt2",
    )  # fmt: skip
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or gpt2")
    p.add_argument(
        "--data", type=Path, metavar="DIR",
        help="the runs' shards, if they have moved; for gpt2: FineWeb-Edu in the lecture's layout "
        "(default: its first file, downloaded)",
    )  # fmt: skip
    p.add_argument("--hellaswag", default="hub", metavar="FILE", help="for gpt2 (default: hub)")
    p.add_argument(
        "--price-per-hour", type=float, metavar="X", help="of the machine that trained, to add cost"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_ladder(commands: Any) -> None:
    p = _add(
        commands, "ladder", do.ladder,
        "climb the lecture's optimisations on this machine, from the naive step to the fastest",
    )  # fmt: skip
    p.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of shards (default: Python's own manual)"
    )
    p.add_argument(
        "--out", type=Path, default=Path("runs/ladder"), metavar="DIR",
        help="where table and picture go (default: %(default)s)",
    )  # fmt: skip
    p.add_argument("--recipe", metavar="RECIPE", help="default: gpt2-124m on a GPU, else gpt2-10m")
    p.add_argument(
        "--steps", type=int, default=20, help="timed steps a rung (default: %(default)s)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def _add_report(commands: Any) -> None:
    p = _add(commands, "report", do.report, "draw the loss curve of a run")
    p.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    p.add_argument("--picture", type=Path, metavar="FILE", help="(default: RUN/loss.png)")


def _add_device(parser: Any) -> None:
    for flag in flags_of(MachineOptions()):
        if flag.name in ("device", "precision"):
            parser.add_argument(flag.spelling, default="auto", help=flag.help)
