"""The subcommands and their arguments. Imports no torch, so that `--help` is fast."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rekindle import __version__, recipes
from rekindle.cli import commands as do
from rekindle.cli import options
from rekindle.cli.arguments import Parser, add_flags
from rekindle.cli.completion import SHELLS, PrintCompletion
from rekindle.cli.hints import nearest, suggestion
from rekindle.data.sources import SOURCES
from rekindle.errors import UserError
from rekindle.evaluate.tasks import TASKS
from rekindle.flags import flags_of
from rekindle.machine import MachineOptions


@dataclass(frozen=True)
class Command:
    """A subcommand: its function, its options and its help."""

    run: Callable[[argparse.Namespace], int | None]
    options: type
    about: str
    notes: str = ""  # printed below the arguments
    usage: str = ""  # the required arguments, for commands with many flags


COMMANDS = {
    "demo": Command(
        do.demo,
        options.Demo,
        "prepare text, train a small model and sample from it: a few minutes, no network needed",
    ),
    "prepare": Command(
        do.prepare,
        options.Prepare,
        "tokenize text into shards",
        "examples:\n"
        "  rekindle prepare fineweb-edu-10bt --layout lecture --out data/fineweb-edu\n"
        "  rekindle prepare fineweb-10bt-tokenized --out data/fineweb\n"
        "  rekindle prepare --parquet DIR --out data/mine\n\n"
        "Files or folders named train are for training; val, valid, validation or dev for\n"
        "validation; test or eval are left out. A folder stands for all matching files below it.\n"
        "If interrupted, run the same command again to resume.",
    ),
    "train": Command(
        do.train,
        options.Train,
        "train a recipe; run the same command again to resume",
        "recipes:\n"
        + "".join(f"  {r.name:16} {r.about}\n" for r in recipes.RECIPES.values())
        + "\nexamples:\n"
        "  rekindle train demo --text my.txt --out runs/mine\n"
        "  rekindle train gpt2-124m --data data/fineweb-edu --out runs/gpt2\n"
        "  torchrun --nproc-per-node 8 -m rekindle train gpt2-124m --data ... --out ...\n\n"
        "A step processes --batch.tokens tokens, in micro-batches of --micro-batch rows on each\n"
        "rank; the number of accumulation steps follows from these.\n"
        'A recipe file is TOML: base = "gpt2-124m", then any settings of the recipe.',
        "RECIPE (--data DIR | --text PATH ...) --out DIR",
    ),
    "eval": Command(
        do.evaluate,
        options.Eval,
        "compute the validation loss and HellaSwag score of a run or model",
        "examples:\n"
        "  rekindle eval runs/gpt2 --hellaswag\n"
        "  rekindle eval gpt2 --data data/fineweb-edu --json",
    ),
    "sample": Command(do.sample, options.Sample, "generate text with a run or model"),
    "verify": Command(
        do.verify, options.Verify, "compare logits, loss, text and gradients with transformers"
    ),
    "check": Command(
        do.check,
        options.Check,
        "compare runs, or OpenAI's weights, with published results",
        "The exit status is 0 if every value is within its band, in an unfinished run so far, and\n"
        "1 otherwise. There are bands for gpt2-124m on FineWeb-Edu, and for gpt2-124m-fast on\n"
        "FineWeb or FineWeb-Edu.\n\n"
        "examples:\n"
        "  rekindle check runs/gpt2 --price-per-hour 24\n"
        "  rekindle check gpt2",
    ),
    "ladder": Command(
        do.ladder,
        options.Ladder,
        "measure the lecture's optimizations one after another on this machine",
    ),
    "report": Command(do.report, options.Report, "plot the loss curve of a run"),
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments; `command` is the `Command`. Raises `UserError` with a suggestion."""
    name = arguments[0]
    if not name.startswith("-") and name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
    parser, subparsers = make_parser(arguments)
    namespace, unknown = parser.parse_known_args(arguments)
    if not unknown:
        return namespace
    command = f"`rekindle {namespace.name}`"
    first = next((a for a in unknown if a.startswith("--")), unknown[0])
    if not first.startswith("-"):
        raise UserError(f"{command} takes no argument {first!r}: quote text that contains spaces")
    flags = [f for f in subparsers[namespace.name]._option_string_actions if f.startswith("--")]
    hint = suggestion(first, flags) or f"see `rekindle {namespace.name} --help`"
    raise UserError(f"{command} has no {first.partition('=')[0]}: {hint}")


def make_parser(arguments: Sequence[str] = ()) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parsers of the subcommands by name. `train` has the flags of the recipe
    named in `arguments`. Raises `UserError` if that is a recipe file that cannot be read."""
    parser = Parser(
        prog="rekindle",
        description="GPT-2 from scratch: tokenization, training, evaluation and sampling.",
        epilog="Start with `rekindle demo`. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"rekindle {__version__}")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        action=PrintCompletion,
        help="print a completion script, for `source <(rekindle --completion bash)` in ~/.bashrc",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    found = {}
    for name, command in COMMANDS.items():
        about = command.about[0].upper() + command.about[1:] + "."
        usage = f"rekindle {name} {command.usage} [FLAGS]" if command.usage else None
        found[name] = p = commands.add_parser(
            name, help=command.about, description=about, epilog=command.notes, usage=usage
        )
        p.set_defaults(command=command, name=name)
        add_flags(p, flags_of(command.options))
    _add_sources(found["prepare"].add_argument_group("sources of text (give exactly one)"))
    _extend_train(found["train"], recipes.named_in(arguments))
    for task in TASKS:
        about = f"score {task} from this file, or from the Hugging Face Hub if no file is given"
        found["eval"].add_argument(f"--{task}", nargs="?", const="hub", metavar="FILE", help=about)
    return parser, found


def _add_sources(group: Any) -> None:
    for name, (_, how) in SOURCES.items():
        group.add_argument(f"--{name}", **how)


def _extend_train(parser: Any, recipe: recipes.Recipe) -> None:
    """Add the flags of `train` that are defined elsewhere."""
    for task in TASKS:
        about = (
            f"score {task} from this file, or `hub`, or `none` (default: hub on a GPU, else none)"
        )
        parser.add_argument(f"--{task}", metavar="FILE", help=about)
    _add_sources(parser.add_argument_group("text to prepare before training, instead of --data"))
    add_flags(parser.add_argument_group("the machine"), flags_of(MachineOptions()))
    title = f"the recipe (defaults are those of {recipe.name})"
    add_flags(parser.add_argument_group(title), flags_of(recipe))
