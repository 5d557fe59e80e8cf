"""The dataclasses of a recipe, in which each number has its source and its help; and their checks.

Imports no torch. Sources: [lecture] "Let's reproduce GPT-2 (124M)", karpathy/build-nanogpt;
[GPT-3] Brown et al. 2020, table 2.1 and appendix B.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from rekindle.errors import UserError
from rekindle.flags import flag, flags_of
from rekindle.model.gpt2_config import SIZES
from rekindle.optim.adamw_config import AdamWConfig


@dataclass(frozen=True)
class Batch:
    """The global batch of one optimizer step. Its partition into micro-batches is not part of a
    recipe: it depends on the machine."""

    tokens: int = flag(524_288, "tokens per optimizer step, over all ranks")  # 2**19 [lecture]
    length: int = flag(1024, "tokens per row (T)")
    order: str = flag(
        "shuffled",
        "shuffled, sequential (as in the files) or lecture (as in the lecture's data loader)",
    )
    # Micro-batch of the published run, on its one rank: B=64, T=1024 [lecture].
    lecture_micro_tokens: int = flag(
        65_536,
        "with --batch.order lecture: tokens per micro-batch of the lecture's run, over all its "
        "ranks; the end of a shard that does not fill one is dropped",
    )

    @property
    def rows(self) -> int:
        return self.tokens // self.length

    @property
    def unit(self) -> int:
        """A shard is used in multiples of this many tokens; the rest at its end is dropped."""
        return self.lecture_micro_tokens if self.order == "lecture" else self.length


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine decay, or a constant rate and a linear cool-down."""

    kind: str = flag("cosine", "cosine, or linear (constant, then a linear cool-down)")
    warmup: int = flag(715, "steps of linear warm-up")  # 375M tokens as in [GPT-3]
    final: float = flag(0.1, "final learning rate as a fraction of the peak")
    cooldown: float = flag(
        0.6, "with --schedule.kind linear: fraction of the steps used for the cool-down"
    )


@dataclass(frozen=True)
class Recipe:
    """Everything that defines a training run, except its data, its folder and its machine."""

    name: str
    about: str
    model: Any = SIZES["gpt2"]  # a `ModelConfig`, of the model's own class
    batch: Batch = Batch()
    optim: Any = field(default_factory=AdamWConfig)  # an `OptimizerConfig`
    schedule: Schedule = Schedule()
    steps: int = flag(
        19_073, "total number of optimizer steps"
    )  # 10B tokens at 524,288 a step [lecture]
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0 disables clipping")  # [lecture]
    spike: float = flag(
        10.0,
        "skip a step whose loss is more than X robust standard deviations above the recent median; "
        "0 disables this",
    )
    seed: int = flag(1337, "seed of the initial weights and the data order")  # [lecture]
    eval_every: int = flag(250, "steps between validations; 0: only at the end")  # [lecture]
    eval_tokens: int = flag(
        10_485_760, "validation tokens per evaluation, the same every time"
    )  # [lecture]
    checkpoint_every: int = flag(250, "steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = flag(3, "number of newest checkpoints to keep; 0: all")
    keep_best: int = flag(1, "number of best checkpoints, by validation loss, to keep in addition")
    keep_every: int = flag(0, "also keep the checkpoints at multiples of N steps; 0: none")
    tokenizer: str = flag(
        "gpt2", "tokenizer for text given with --text, --jsonl or another source", "NAME"
    )
    prompt: str = flag("Hello, I'm a language model,", "prompt of the samples")  # [lecture]
    # Plain sentences, so that the curves show what is learned: words, names, grammar.
    passage: str = flag(
        "The capital of France is Paris. Two and two are four, and the children who live next "
        "door are playing in the garden.",
        "text whose loss is logged for each token at every validation",
    )


# May change when a run is resumed, since none of them affects the steps already taken.
FREE_ON_RESUME = (
    "about", "steps", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints",
    "keep_best", "keep_every", "tokenizer", "prompt", "passage",
)  # fmt: skip

ORDERS = ("shuffled", "sequential", "lecture")
BELOW_ONE = ("optim.beta1", "optim.beta2", "optim.momentum", "optim.momentum_start")
SCHEDULES = ("cosine", "linear")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dataclass as a flat dict, whose keys are also the flags: `{"optim.lr": 0.0006}`."""
    flat: dict[str, Any] = {}
    for item in fields(value):
        inner = getattr(value, item.name)
        name = f"{prefix}{item.name}"
        flat |= flatten(inner, f"{name}.") if is_dataclass(inner) else {name: inner}
    return flat


def override(value: Any, changes: dict[str, Any], prefix: str = "") -> Any:
    """A copy of a dataclass with the fields in `changes`, by dotted name.

    Raises `UserError` that names the flags if a dataclass does not accept its new values.
    """
    own = {name: new for name, new in changes.items() if "." not in name}
    for name in {name.split(".")[0] for name in changes if "." in name}:
        inner = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith(f"{name}.")}
        own[name] = override(getattr(value, name), inner, f"{prefix}{name}.")
    try:
        return dataclasses.replace(value, **own)
    except UserError as error:
        names = "|".join(item.name for item in fields(value))
        message = re.sub(
            rf"\b({names})\b", lambda m: f"--{prefix}{m[0]}".replace("_", "-"), str(error)
        )
        raise UserError(message) from None


def with_vocabulary(recipe: Recipe, vocab_size: int) -> Recipe:
    """The recipe for data with `vocab_size` token ids, with the embedding padded for training."""
    sizes = dataclasses.replace(recipe.model, vocab_size=vocab_size, padded_vocab_size=0)
    return dataclasses.replace(recipe, model=sizes.for_training())


def check(recipe: Recipe) -> None:
    """Raise `UserError`, which names the flag, if a value of the recipe is invalid."""
    for name, value in flatten(recipe).items():
        if name.startswith("model."):  # checks itself
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, str):
            _check_text(flag, value)
        if isinstance(value, int | float) and not value >= 0:  # also rejects nan
            raise UserError(f"{flag} must be at least 0, but is {value}")
        if value == math.inf:
            raise UserError(f"{flag} must be a finite number, but is {value}")
        if name == "seed" and value >= 2**63:
            raise UserError(f"{flag} must be below 2^63, but is {value}")
        if name in BELOW_ONE and float(value) >= 1:
            raise UserError(f"{flag} must be below 1, but is {value}")
    model, batch = recipe.model, recipe.batch
    if batch.length > model.block_size:
        raise UserError(
            f"--batch.length {batch.length} is longer than --model.block-size {model.block_size}"
        )
    if batch.length < 1 or batch.tokens < 1 or batch.tokens % batch.length:
        raise UserError(
            f"--batch.tokens {batch.tokens} is not a whole number of windows of "
            f"--batch.length {batch.length}"
        )
    _check_order(batch)
    _check_schedule(recipe.schedule)
    if recipe.eval_tokens < 1:
        raise UserError(
            "--eval-tokens must be at least 1: to train without validation, prepare the data with "
            "--val-tokens 0"
        )


def _check_text(flag: str, text: str) -> None:
    """Raise `UserError` unless `text` is valid Unicode, as tokenizers and JSON require."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} is not UTF-8: check the encoding of your terminal") from None


def warnings(recipe: Recipe) -> list[str]:
    """Likely mistakes in a recipe, one line each."""
    found, warmup = [], recipe.schedule.warmup
    if warmup >= recipe.steps:
        found.append(
            f"--schedule.warmup {warmup} is not shorter than --steps {recipe.steps}: the learning "
            "rate never reaches its peak"
        )
    if not recipe.prompt:
        found.append("--prompt is empty: no samples are logged")
    return found


def _check_schedule(schedule: Schedule) -> None:
    if schedule.kind not in SCHEDULES:
        raise UserError(f"--schedule.kind must be {' or '.join(SCHEDULES)}, not {schedule.kind!r}")
    for name, value in (("final", schedule.final), ("cooldown", schedule.cooldown)):
        if value > 1:
            raise UserError(f"--schedule.{name} must be at most 1, but is {value}")


def _check_order(batch: Batch) -> None:
    if batch.order not in ORDERS:
        raise UserError(f"--batch.order must be {' or '.join(ORDERS)}, not {batch.order!r}")
    flag = f"--batch.lecture-micro-tokens {batch.lecture_micro_tokens}"
    if batch.order != "lecture" and batch.lecture_micro_tokens != Batch.lecture_micro_tokens:
        raise UserError(f"{flag} has no effect with --batch.order {batch.order}: leave it out")
    if batch.unit < 1 or batch.unit % batch.length:
        raise UserError(f"{flag} is not a whole number of windows of --batch.length {batch.length}")


DEFAULTS = flatten(Recipe("", ""))
# Schema of a flattened recipe in a JSON file. Fields of the model and the optimizer depend on their
# classes. Fields newer than the file are missing.
SCHEMA: dict[str, Any] = {
    f"{f.name}?": f.type
    for f in flags_of(Recipe("", ""))
    if not f.name.startswith(("model.", "optim."))
} | {"batch.length": range(1, 2**31), "eval_tokens": int, "seed?": range(2**63)}
del SCHEMA["batch.length?"], SCHEMA["eval_tokens?"]
RENAMED = {"optim.clip": "grad_clip", "optim.spike": "spike"}  # in runs of version 0.1.0
REMOVED = ("batch.micro",)  # the micro-batch size belongs to the machine


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields in which two flattened recipes differ, except those that may change.

    A field that `before` does not have is newer than the run, and counts as its default.
    """
    defaults = {name: value for name, value in DEFAULTS.items() if name in now}
    before = {**defaults, **{RENAMED.get(name, name): value for name, value in before.items()}}
    names = [n for n in {**before, **now} if n not in (*FREE_ON_RESUME, *REMOVED)]
    return [
        f"--{n.replace('_', '-')} was {before.get(n)}, now {now.get(n)}"
        for n in names
        if before.get(n) != now.get(n)
    ]
