"""Micro-batch search, and the decision whether to recompute activations.

The global batch never changes, only how it is divided. A row is one sequence of T tokens.
"""

import torch

from rekindle.errors import UserError
from rekindle.model import LanguageModel, ModelConfig
from rekindle.runtime.device import Device, memory_of
from rekindle.runtime.distributed import World
from rekindle.runtime.sharding import is_sharded

MAX_ROWS = 64  # as in the lecture; 128 are predicted to gain less than 1 % on an H200
MIN_ROWS = 4  # fewer rows cannot keep a GPU busy; recomputing activations then costs less
# A micro-batch needs the most memory for its float32 logits. On a CPU, more than this gains nothing
# (benchmarks/LOG.md), and the micro-batch as a whole needs about ten times as much.
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 2**30, 2 * 2**30
CPU_LOGITS_SHARE = 1 / 16  # fraction of the machine's memory


def must_recompute(
    model: LanguageModel, T: int, device: Device, world: World, *, compiled: bool
) -> bool:
    """Whether fewer than `MIN_ROWS` rows fit into some rank's GPU without recomputing activations.
    False for a sharded model, which is not measured: there the user decides (`--recompute`).
    `compiled`: whether the model will be compiled."""
    if device.torch.type != "cuda" or is_sharded(model):
        return False
    return world.min(_rows_in_gpu_memory(model, T, device, compiled), device.torch) < MIN_ROWS


def choose_micro_batch(
    model: LanguageModel, rows: int, T: int, device: Device, world: World, *, compiled: bool
) -> int:
    """Rows per forward pass: as many as fit into memory and divide each rank's share of the batch.

    `rows`: rows of the global batch; `compiled`: whether the model will be compiled. Raises
    `UserError` if the ranks cannot share the rows evenly, if not even one row fits, or if the model
    is sharded over GPUs: in a measurement, a rank that runs out of memory would leave the others
    waiting.
    """
    if rows % world.size:
        raise UserError(f"a batch of {rows} rows does not divide over {world.size} ranks")
    if device.torch.type == "cuda" and is_sharded(model):
        raise UserError("--shard: the micro-batch size is not chosen for you: give --micro-batch")
    if device.torch.type == "cuda":
        max_rows = min(MAX_ROWS, _rows_in_gpu_memory(model, T, device, compiled))
    else:
        max_rows = rows_for(model.config, T, device)
    max_rows = world.min(max_rows, device.torch)
    if not max_rows:
        raise UserError(
            f"one row of {T} tokens does not fit in the memory of the {device.name}: use a smaller "
            "model or --batch.length"
        )
    share = rows // world.size
    return next(n for n in range(min(max_rows, share), 0, -1) if share % n == 0)


def rows_for(config: ModelConfig, T: int, device: Device) -> int:
    """A safe number of rows, estimated from the size of their logits without measuring."""
    budget = GPU_LOGITS_BYTES
    if device.torch.type == "cpu":
        budget = min(CPU_LOGITS_BYTES, int(CPU_LOGITS_SHARE * memory_of(device.torch)))
    return max(1, min(MAX_ROWS, budget // (T * config.padded_vocab_size * 4)))


def _rows_in_gpu_memory(model: LanguageModel, T: int, device: Device, compiled: bool) -> int:
    """Measure the memory for one and two rows, and extrapolate how many fit; 0: not even one.

    Runs the model uncompiled. If it will be compiled, head and loss are left out and their memory
    is calculated: eager code keeps several float32 copies of the logits, compiled code one copy
    and its gradient, in the dtype of the matmuls (`benchmarks.traffic`). Eager blocks keep half
    as much again as compiled ones, which is a margin (benchmarks/LOG.md). The optimizer state is
    already allocated.
    """
    # Bytes per row of the logits and their gradient.
    logits = 2 * T * model.config.padded_vocab_size * device.product_dtype.itemsize
    peaks = []
    for rows in (1, 2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device.torch)
        idx = torch.zeros(rows, T, dtype=torch.long, device=device.torch)
        try:
            with device.autocast():
                loss = model.body(idx).float().mean() if compiled else model.forward(idx, idx)[1]
            assert loss is not None
            loss.backward()
        except torch.OutOfMemoryError:
            return rows - 1
        finally:
            for p in model.parameters():
                p.grad = None
        peak = torch.cuda.max_memory_allocated(device.torch)
        peaks.append(peak + rows * logits if compiled else peak)
    _, total = torch.cuda.mem_get_info(device.torch)
    room = 0.9 * total - peaks[0]
    return 1 + max(0, int(room / max(1, peaks[1] - peaks[0])))
