"""The command line: one function for each subcommand, and the only place that prints an error.

Nothing here imports torch before a command needs it, so that `--help` answers at once.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle import __version__, recipes
from rekindle.errors import Stopped, UserError

RUN_OR_MODEL = (
    "a run folder, a checkpoint, gpt2 | gpt2-medium | gpt2-large | gpt2-xl, or a folder in "
    "Hugging Face's layout"
)

# What each number of a recipe means to someone who changes it.
FLAGS = {
    "steps": "optimizer steps in all",
    "seed": "seed of the initial weights and of the order of the data",
    "eval_every": "steps between validations, 0: only at the end",
    "eval_tokens": "validation tokens to score, always the same ones",
    "checkpoint_every": "steps between checkpoints, 0: only at the end",
    "keep_checkpoints": "newest checkpoints to keep, 0: all",
    "keep_best": "checkpoints of the lowest validation loss to keep beside them",
    "keep_every": "keep the checkpoints at multiples of so many steps as well, 0: none",
    "prompt": "what the samples begin with",
    "batch.tokens": "tokens of one optimizer step, over all ranks",
    "batch.length": "tokens in a window (T)",
    "batch.order": "shuffled, sequential as the files are, or lecture as its loader reads",
    "batch.lecture_micro_tokens": "with the order lecture: tokens of one micro-batch of the "
    "lecture's run over all its ranks; a shard gives whole ones",
    "batch.micro": "rows of one forward pass, 0: found for the device",
    "optim.lr": "peak learning rate",
    "optim.beta1": "AdamW's first decay",
    "optim.beta2": "AdamW's second decay",
    "optim.eps": "AdamW's epsilon",
    "optim.weight_decay": "weight decay, on matrices only",
    "grad_clip": "largest norm of the gradient, 0: any",
    "spike": "skip a step whose loss is more than X robust standard deviations above the recent "
    "median, 0: never",
    "schedule.warmup": "steps of linear warm-up",
    "schedule.final": "last learning rate, as a fraction of the peak",
    "model.n_layer": "blocks",
    "model.n_head": "attention heads",
    "model.n_embd": "width of the residual stream",
    "model.block_size": "longest context",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (verify: they differ), 2 (a user's mistake), or
    128 and the number of the signal that asked to stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not all of them can print what a model says
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    _keep_compiled()
    try:
        return options.command(options) or 0
    except UserError as error:
        return _fail(str(error))
    except OSError as error:  # of a disk or a stream; where more can be said, it was
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}: mend that and give the same command again")
    except UnicodeError as error:
        return _fail(f"a text or a name is no UTF-8 ({error})")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"rekindle: {stopped}", file=sys.stderr, flush=True)
        return stopped.status
    except KeyboardInterrupt:
        print("\nrekindle: stopped; the same command goes on from what was saved", file=sys.stderr)
        return 130


def _fail(said: str) -> int:
    """Print what is wrong, and return the exit status of a user's mistake."""
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    where = f" (rank {rank})" if ranks != "1" else ""
    # In one piece, or the lines of several ranks run together.
    print(f"rekindle: error{where}: {said}\n", end="", file=sys.stderr, flush=True)
    return 2


def _keep_compiled() -> None:
    """Let compiled graphs outlive the machine's temporary folder, so that a run that goes on begins
    at once. Has to be said before torch is imported."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(caches, "rekindle", "compiled")
    if not _may_be_made(folder):  # as for users without a home
        folder = Path(tempfile.gettempdir(), f"rekindle-compiled-{getattr(os, 'getuid', str)()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _may_be_made(folder: Path) -> bool:
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return folder.is_absolute() and there.is_dir() and os.access(there, os.W_OK)


def prepare(o: argparse.Namespace) -> None:
    from rekindle.data.prepare import prepare
    from rekindle.data.sources import SOURCES, from_arguments

    flags = {name: getattr(o, name) for name in SOURCES}
    source = from_arguments(o.dataset, **flags)
    out = o.out or (o.shards if o.shards else None)
    if out is None:
        raise UserError("say where the shards go: --out DIR")
    prepare(
        source, out, tokenizer=o.tokenizer, val_tokens=o.val_tokens, shard_tokens=o.shard_tokens,
        layout=o.layout,
    )  # fmt: skip


def train(o: argparse.Namespace) -> None:
    recipe = recipes.get_recipe(o.recipe)
    changes = {name: getattr(o, name) for name in FLAGS if hasattr(o, name)}
    recipe = recipes.override(recipe, changes)
    recipes.check(recipe)
    if not o.timeout >= 0:  # nor is nan
        raise UserError(f"--timeout must be at least 0 seconds, but is {o.timeout}")

    from rekindle.run import RunOptions
    from rekindle.train import train

    options = RunOptions(
        device=o.device, precision=o.precision, compile=o.compile, kernels=o.kernels,
        recompute=o.recompute, deterministic=o.deterministic, shard=o.shard,
        hellaswag=o.hellaswag, timeout=o.timeout, fork=o.fork,
    )  # fmt: skip
    train(recipe, o.data, o.out, options)


def evaluate(o: argparse.Namespace) -> None:
    from rekindle.evaluate.command import evaluate_model
    from rekindle.observe.console import Console
    from rekindle.runtime.distributed import place

    for flag, value in (("--tokens", o.tokens), ("--limit", o.limit)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, but is {value}")
    console = Console(quiet=o.json or not place().is_main)
    tasks = {} if o.hellaswag is None else {"hellaswag": o.hellaswag}
    results = evaluate_model(
        o.model, data=o.data, tasks=tasks, tokens=o.tokens, limit=o.limit,
        device=o.device, precision=o.precision, console=console,
    )  # fmt: skip
    if o.json and place().is_main:
        print(json.dumps(results))


def sample(o: argparse.Namespace) -> None:
    from rekindle.generate.sampling import cut_at_end, generate
    from rekindle.load import load
    from rekindle.runtime.device import get_device, why_not_compile

    device = get_device(o.device, o.precision)
    if o.compile and (reason := why_not_compile(device.torch)):
        raise UserError(f"--compile cannot be done here: {reason}")
    loaded = load(o.model, device)
    loaded.model.cast(device.product_dtype, rows=o.num)
    prompt = loaded.tokenizer.encode(o.prompt)
    with device.autocast():
        ids = generate(
            loaded.model, prompt or [loaded.tokenizer.end_of_text], o.tokens, num=o.num,
            seed=o.seed, temperature=o.temperature, top_k=o.top_k, compile=o.compile,
        )  # fmt: skip
    end = loaded.tokenizer.end_of_text
    rows = [cut_at_end(row, end, start=len(prompt) or 1) for row in ids.tolist()]
    texts = [loaded.tokenizer.decode([t for t in row if t != end]) for row in rows]
    if o.json:
        print(json.dumps({"model": loaded.name, "prompt": o.prompt, "samples": texts}))
        return
    for i, text in enumerate(texts, 1):
        print(f"--- {i} of {o.num} ---\n{text}")


def verify(o: argparse.Namespace) -> int:
    from rekindle.interop.verify import verify

    report = verify(o.model, random_weights=o.random_weights, layers=o.layers)
    print(json.dumps(report.as_dict()) if o.json else report.table())
    return 0 if report.passed else 1


def demo(o: argparse.Namespace) -> None:
    from rekindle.demo import demo

    demo(data=o.data, out=o.out, device=o.device, steps=o.steps)


def ladder(o: argparse.Namespace) -> None:
    import time

    from rekindle.data import sources
    from rekindle.data.prepare import prepare
    from rekindle.ladder import climb, summary
    from rekindle.observe.report import draw_ladder

    if o.steps < 2:
        raise UserError(f"--steps must be at least 2, but is {o.steps}")
    began = time.perf_counter()
    data = o.data or o.out / "data"
    if o.data is None:
        prepare(sources.from_arguments(embedded=True), data, tokenizer="gpt2", val_tokens=0)
    result = climb(data, o.out, o.device, o.recipe, o.steps)
    print(summary(result, time.perf_counter() - began))
    print(f"wrote {o.out / 'ladder.json'}")
    try:
        print(f"wrote {draw_ladder(result, o.out / 'ladder.png')}")
    except UserError as error:  # the figures are there
        print(f"no picture: {error}")


def report(o: argparse.Namespace) -> None:
    from rekindle.observe.report import draw_loss

    print(f"wrote {draw_loss(o.run, o.picture or o.run / 'loss.png')}")


def _parser() -> argparse.ArgumentParser:
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
    _add_train(commands)
    _add_eval(commands)
    _add_sample(commands)
    _add_verify(commands)
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
    parser.set_defaults(command=function)
    return parser


def _add_demo(commands: Any) -> None:
    p = _add(commands, "demo", demo, "the whole road in a few minutes, without a network")
    p.add_argument("--data", type=Path, default=Path("data/demo"), help="(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="(default: %(default)s)")
    p.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: about 2 min)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")


def _add_prepare(commands: Any) -> None:
    from rekindle.data.sources import SOURCES

    p = _add(
        commands, "prepare", prepare, "turn text into shards of tokens",
        "examples:\n"
        "  rekindle prepare fineweb-edu-10bt --layout lecture --out data/fineweb-edu\n"
        "  rekindle prepare fineweb-10bt-tokenized --out data/fineweb\n"
        "  rekindle prepare --parquet DIR --out data/mine\n"
        "Files or folders with the word val, valid, validation or dev in their name are held out;\n"
        "those with test or eval are left out. A folder stands for all such files below it.\n"
        "Killed or stopped, the same command goes on; when all is there, it does nothing.",
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


def _add_train(commands: Any) -> None:
    names = "\n".join(f"  {r.name:16} {r.about}" for r in recipes.RECIPES.values())
    p = _add(
        commands, "train", train, "train a recipe; the same command again goes on",
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
    p.add_argument(
        "--hellaswag", default="auto", metavar="FILE",
        help="score HellaSwag from this file, `hub`, or `none` (default: from the hub on a GPU)",
    )  # fmt: skip
    _add_device(p, precision=None)
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile the model (default: yes, where it can be)",
    )  # fmt: skip
    p.add_argument(
        "--kernels", action=argparse.BooleanOptionalAction, default=None,
        help="Triton kernels for head, loss and MLP, for bf16 on a GPU (default: no)",
    )  # fmt: skip
    p.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction, default=None,
        help="recompute activations in the backward pass: less memory, slower (default: where only "
        "that lets a few rows fit)",
    )  # fmt: skip
    p.add_argument(
        "--deterministic", action=argparse.BooleanOptionalAction, default=None,
        help="on a GPU the same bits from run to run, at some cost of speed (default: no; a CPU "
        "always does)",
    )  # fmt: skip
    p.add_argument(
        "--shard", action=argparse.BooleanOptionalAction, default=None,
        help="share out weights, gradients and moments over the ranks, for a model that does not "
        "fit into one GPU; not compiled, and needs --batch.micro on a GPU (default: no)",
    )  # fmt: skip
    p.add_argument(
        "--timeout", type=float, default=600.0, metavar="S",
        help="seconds that a rank waits for the others before it says which one holds it up, and "
        "ends; 0: for ever (default: %(default)s)",
    )  # fmt: skip
    numbers = p.add_argument_group("the recipe's numbers")
    defaults = recipes.flatten(recipes.RECIPES["gpt2-124m"])
    for name, about in FLAGS.items():
        kind = type(defaults[name])
        numbers.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=kind, default=argparse.SUPPRESS,
            metavar={int: "N", float: "X"}.get(kind, "TEXT"), help=about,
        )  # fmt: skip


def _add_eval(commands: Any) -> None:
    p = _add(
        commands, "eval", evaluate, "validation loss and HellaSwag of a run or model",
        "examples:\n"
        "  rekindle eval runs/gpt2 --hellaswag\n"
        "  rekindle eval gpt2 --data data/fineweb-edu --json",
    )  # fmt: skip
    p.add_argument("model", metavar="RUN_OR_MODEL", help=RUN_OR_MODEL)
    p.add_argument(
        "--data", type=Path, metavar="DIR", help="shards to score (default: the run's own)"
    )
    p.add_argument(
        "--hellaswag", nargs="?", const="hub", metavar="FILE",
        help="score HellaSwag, from a file or else from the hub",
    )  # fmt: skip
    p.add_argument("--tokens", type=int, metavar="N", help="validation tokens to score at most")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N HellaSwag questions")
    _add_device(p)
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_sample(commands: Any) -> None:
    p = _add(commands, "sample", sample, "let a run or model continue a text")
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
        commands, "verify", verify, "compare logits, loss, text and gradients with transformers"
    )
    p.add_argument("model", metavar="MODEL", help="gpt2 ... gpt2-xl, or a folder in HF's layout")
    p.add_argument(
        "--random-weights", action="store_true", help="a random model of that size: no network"
    )
    p.add_argument("--layers", type=int, metavar="N", help="with --random-weights: fewer blocks")
    p.add_argument("--json", action="store_true", help="print one JSON object")


def _add_ladder(commands: Any) -> None:
    p = _add(
        commands, "ladder", ladder,
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
    p = _add(commands, "report", report, "draw the loss curve of a run")
    p.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    p.add_argument("--picture", type=Path, metavar="FILE", help="(default: RUN/loss.png)")


def _add_device(parser: Any, precision: str | None = "auto") -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--precision",
        default=precision,
        help="auto, autocast (products in bf16), bf16 (the residual stream too), tf32 or fp32",
    )
