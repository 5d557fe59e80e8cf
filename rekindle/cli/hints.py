"""What to suggest for a command or flag that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches

# The flag here → what other projects call it.
OTHER_NAMES = {
    "--batch.length": ("seq-len", "seq-length", "sequence-length", "block-size"),
    "--batch.tokens": ("total-batch-size", "tokens-per-step"),
    "--checkpoint-every": ("save-every", "save-interval"),
    "--data": ("dataset", "data-dir"),
    "--eval-every": ("eval-interval", "val-loss-every"),
    "--eval-tokens": ("eval-iters", "val-max-steps"),
    "--grad-clip": ("max-grad-norm", "grad-norm-clip"),
    "--log-every": ("log-interval", "print-every"),
    "--micro-batch": ("micro-batch-size", "device-batch-size"),
    "--num": ("num-samples", "n-samples", "num-return-sequences"),
    "--optim.lr": ("learning-rate", "max-lr"),
    "--out": ("out-dir", "output", "output-dir", "checkpoint-dir"),
    "--precision": ("dtype", "amp", "bf16", "fp16"),
    "--prompt": ("start", "text"),
    "--recompute": ("gradient-checkpointing", "activation-checkpointing"),
    "--schedule.final": ("min-lr",),
    "--schedule.warmup": ("warmup-iters", "warmup-steps"),
    "--steps": ("max-iters", "max-steps", "num-iterations", "num-steps", "epochs"),
    "--tokens": ("max-new-tokens", "max-length"),
}
# Flags that have no counterpart here.
EXPLAINED = {
    ("batch-size",): "--micro-batch sets the rows of one forward pass, --batch.tokens the tokens "
    "of one optimizer step",
    ("grad-accum", "grad-accum-steps", "gradient-accumulation-steps", "accumulation-steps"): (
        "gradient accumulation follows from --batch.tokens, --micro-batch and the number of ranks"
    ),
    ("dropout", "attention-dropout"): "these models have no dropout",
    ("init-from",): "--fork RUN starts from another run's weights, optimizer state and step",
    ("resume", "resume-from"): "to resume a run, run the same command again",
}


def suggestion(given: str, flags: Iterable[str]) -> str:
    """What to use instead of the flag `given`, in one clause; empty if nothing is close."""
    flags, name = list(flags), given.lstrip("-").partition("=")[0].lower().replace("_", "-")
    for names, text in EXPLAINED.items():
        if name in names and "--steps" in flags:  # the command is `train`
            return text
    found = [flag for flag in flags if flag.rpartition(".")[2].lstrip("-") == name]
    found = found or [f for f, others in OTHER_NAMES.items() if name in others and f in flags]
    found = found or get_close_matches(f"--{name}", flags, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(found)}?" if found else ""


def nearest(given: str, names: Iterable[str]) -> str:
    """`: did you mean X?`, or `: use one of ...`."""
    names = list(names)
    near = get_close_matches(given, names, n=2, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else f": use {', '.join(names)}"
