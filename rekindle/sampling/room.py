"""Whether there is memory for as many texts as were asked for."""

import os
from pathlib import Path

import torch

from rekindle.errors import UserError
from rekindle.model import LanguageModel

# Copies in float32 of one step's logits that are alive at once (see `sampling.draw`): the logits
# over the temperature; over all ids also the probabilities, the random numbers and the quotient.
COPIES, COPIES_OF_ALL = 2, 5


def bytes_for(model: LanguageModel, num: int, length: int, top_k: int) -> int:
    """Memory for `num` texts of `length` tokens: the ids, one step's logits, keys and values."""
    c = model.config
    size = min(p.element_size() for p in model.parameters())  # 2 where the weights are bf16
    embedding = next(n for n, role in model.parameter_roles().items() if role == "embedding")
    width = dict(model.named_parameters())[embedding].shape[-1]
    cache = 2 * c.n_layer * width * length * size
    logits = c.padded_vocab_size * (size + 4 * (COPIES if top_k else COPIES_OF_ALL))
    return num * (cache + logits + 8 * length)


def check_room(model: LanguageModel, num: int, length: int, top_k: int) -> None:
    """Raises `UserError` if `num` texts of `length` tokens do not fit into the memory that is free
    on the model's device. Where nobody can tell how much that is, they are tried."""
    device = next(iter(model.parameters())).device
    free, needed = _free(device), bytes_for(model, num, length, top_k)
    if free is not None and needed > free:
        fits = free // bytes_for(model, 1, length, top_k)
        raise UserError(
            f"--num {num} texts of {length} tokens need {needed / 2**30:,.1f} GiB of memory, and "
            f"{free / 2**30:,.1f} GiB are free: lower --num to {max(1, fits):,}, or --tokens"
        )


def _free(device: torch.device) -> int | None:
    """Free bytes of `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    return min(_of_machine(), _of_container()) if device.type == "cpu" else None


def _of_machine() -> int:
    """What Linux calls available, or all that is built in; 2^63 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return 2**63


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container may still take (cgroup v2), cached files counted as free; 2^63 where it has
    no limit."""
    try:
        most, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
        cached = stat.get("active_file", 0) + stat.get("inactive_file", 0)
        return max(0, most - taken + cached)
    except (OSError, ValueError):  # there is none, or it says "max"
        return 2**63
