"""What a run computes on and how: what was asked (`MachineOptions`), what was decided (`Machine`).

A recipe says what is computed and a machine how: another machine gives the same result within
rounding, the same machine the same bits. Imports torch only when something is decided.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rekindle.errors import UserError
from rekindle.flags import flag

if TYPE_CHECKING:
    from rekindle.runtime.device import Device
    from rekindle.runtime.distributed import World

SAME_MEMORY = 0.05  # how much the memory of two machines of one kind may differ, as a fraction


@dataclass(frozen=True)
class MachineOptions:
    """What was asked of the machine. None: as the run was started, or the best for this machine."""

    device: str | None = flag(None, "auto, cpu, cuda or mps (default: auto)")
    precision: str | None = flag(
        None,
        "auto, autocast (matmuls in bf16), bf16 (the residual stream too), tf32 or fp32 "
        "(default: auto)",
    )
    compile: bool | None = flag(None, "torch.compile the model (default: yes, where possible)")
    kernels: bool | None = flag(
        None, "Triton kernels for head, loss and MLP, for bf16 on a GPU (default: no)"
    )
    fp8_head: bool | None = flag(
        None,
        "matmuls of the head in FP8 while training, for the modern model on a GPU of Hopper's "
        "class; not measured yet (default: no)",
    )
    recompute: bool | None = flag(
        None,
        "keep only each block's input for the backward pass (activation checkpointing): less "
        "memory, slower (default: only where few rows fit without it)",
    )
    deterministic: bool | None = flag(
        None,
        "the same bits from run to run on a GPU, at some cost of speed; a CPU always computes so "
        "(default: no)",
    )
    shard: bool | None = flag(
        None,
        "shard weights, gradients and optimizer state over the ranks, for a model that does not "
        "fit into one GPU; not compiled, and needs --micro-batch on a GPU (default: no)",
    )
    micro_batch: int | None = flag(
        None, "rows of one forward pass on one rank (default: found for the device)"
    )
    threads: int | None = flag(None, "CPU threads (default: PyTorch's, one a core)")

    def __post_init__(self) -> None:
        for name in ("micro_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, but is {value}")


@dataclass(frozen=True)
class Machine:
    """What was decided. Recorded in every checkpoint, and the same on every rank but for the
    processor's own: its name, memory and threads."""

    device: str  # cpu, cuda or mps
    precision: str
    compile: bool
    kernels: bool
    deterministic: bool
    shard: bool  # where there is more than one rank
    threads: int = field(metadata={"schema": range(1, 4096)})  # of a CPU
    recompute: bool | None = None  # None until `trainer.build` has measured
    micro_batch: int | None = field(  # None until then, too
        default=None, metadata={"schema": (None, range(1, 2**31))}
    )
    fp8_head: bool = False
    keep_memory: bool = True  # a CPU's freed memory is kept for the next tensors
    name: str = ""  # what a person calls the device
    memory: int = 0  # bytes of the device; 0: unknown

    def agreed(self) -> dict[str, Any]:
        """What every rank must have decided alike."""
        own = ("name", "memory", "threads", "keep_memory")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in own}

    def open(self, local_rank: int = 0) -> "Device":
        """The device, set up for this process: threads, precision of matmuls, deterministic
        algorithms, memory of the CPU's allocator."""
        import torch

        from rekindle.runtime import device as devices

        torch.set_num_threads(self.threads)
        device = devices.get_device(self.device, self.precision, local_rank)
        devices.make_deterministic(device, on_gpu=self.deterministic)
        if self.keep_memory:
            devices.keep_freed_memory(device)
        return device


def resolve(
    options: MachineOptions | None = None,
    recorded: Machine | None = None,
    world: "World | None" = None,
    *,
    rows: int | None = None,
) -> Machine:
    """Decide on a machine, from what is asked and from what the run's checkpoint has recorded.

    A recorded value is kept where this device can do it. The micro-batch size, recomputation and
    the number of threads depend on the device's memory and cores, so they are kept only if those
    are the same; and the micro-batch size only if it still divides a global batch of `rows` rows.
    Raises `UserError` if what was asked cannot be had.
    """
    import torch

    from rekindle.data.cores import usable_cores
    from rekindle.model import fp8, kernels
    from rekindle.runtime import device as devices

    asked = options or MachineOptions()
    rank, ranks = (world.local_rank, world.size) if world else (0, 1)
    device = devices.get_device(asked.device or "auto", "auto", rank)
    kind, memory = device.torch.type, devices.memory_of(device.torch)
    same = recorded is not None and _same_device(recorded, kind, memory)

    def decide(name: str, default: Any, *, can: bool = True) -> Any:
        """What was asked, else what was recorded if it `can` be done here, else the default."""
        value = getattr(asked, name)
        if value is None and recorded is not None and can:
            value = getattr(recorded, name)
        return default if value is None else value

    usable = recorded is not None and devices.can_use(recorded.precision, device.torch)
    device = devices.get_device(kind, decide("precision", "auto", can=usable), rank)
    shard = decide("shard", False)
    why = "it is sharded" if shard and ranks > 1 else devices.why_not_compile(device.torch)
    no_kernels = kernels.why_not(device.torch, device.product_dtype)
    if asked.kernels and no_kernels:
        raise UserError(f"--kernels: {no_kernels}; say --no-kernels")
    no_fp8 = fp8.why_not(device.torch)
    if asked.fp8_head and no_fp8:
        raise UserError(f"--fp8-head: {no_fp8}; leave it out")
    micro_batch = recorded.micro_batch if recorded else None
    divides = bool(micro_batch) and not (rows and rows % (micro_batch * ranks))
    fewer_cores = recorded is not None and recorded.threads > usable_cores()
    return Machine(
        device=kind,
        precision=device.precision,
        compile=decide("compile", True) and not why,
        kernels=decide("kernels", False) and not no_kernels,
        fp8_head=decide("fp8_head", False) and not no_fp8,
        deterministic=decide("deterministic", False),
        shard=shard,
        threads=decide("threads", torch.get_num_threads(), can=same and not fewer_cores),
        recompute=decide("recompute", None if kind == "cuda" else False, can=same),
        micro_batch=decide("micro_batch", None, can=same and divides),
        name="CPU" if kind == "cpu" else device.name,
        memory=memory,
    )


def _same_device(recorded: Machine, kind: str, memory: int) -> bool:
    """Whether the device has the memory that the run was started with. Checkpoints of version 0.1
    may not say; then it is assumed."""
    if recorded.device not in ("", kind):
        return False
    return not recorded.memory or abs(memory / recorded.memory - 1) < SAME_MEMORY


def changes(recorded: Machine, now: Machine, options: MachineOptions) -> str:
    """One line on what this machine does differently than the run was started, beyond what was
    asked; empty if nothing."""
    found = [
        f"{name.replace('_', '-')} {getattr(now, name)} instead of {before}"
        for name in (item.name for item in dataclasses.fields(MachineOptions))
        if getattr(options, name) is None
        and (before := getattr(recorded, name)) not in (None, "")
        and before != getattr(now, name)
    ]
    return ", ".join(found).replace("True", "yes").replace("False", "no")
