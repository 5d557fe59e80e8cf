"""A GPU that is not there: what Triton and Inductor ask of a card, answered without one.

Triton compiles for any card it is told of, and Inductor writes its kernels from shapes alone. Both
only want to know which card: its architecture, its number of SMs, its shared memory.
"""

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Card:
    """What a compiler wants to know of a GPU. Sources: NVIDIA's data sheets, and the table of
    compute capabilities in the CUDA C++ programming guide."""

    name: str
    capability: int  # 90 is sm_90
    sms: int
    sm_threads: int  # that an SM holds at most
    block_shared: int  # bytes of shared memory that a block may ask for
    sm_shared: int  # bytes of shared memory on an SM
    memory_gib: int
    l2_mib: int


CARDS = {
    "sm_80": Card("NVIDIA A100", 80, 108, 2048, 166_912, 167_936, 80, 40),
    "sm_89": Card("NVIDIA GeForce RTX 4090", 89, 128, 1536, 101_376, 102_400, 24, 72),
    "sm_90": Card("NVIDIA H200", 90, 132, 2048, 232_448, 233_472, 139, 60),
}


def pretend_to_triton(card: Card) -> None:
    """Let Triton compile for this card. Nothing can be launched."""
    # By their names: a type checker on a system without Triton knows neither.
    runtime: Any = importlib.import_module("triton.runtime")
    compiler: Any = importlib.import_module("triton.backends.compiler")
    target = compiler.GPUTarget("cuda", card.capability, 32)
    properties = {
        "max_shared_mem": card.block_shared,
        "multiprocessor_count": card.sms,
        "warpSize": 32,
        "max_num_regs": 65_536,
    }
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: card.capability,  # Triton remembers a target for each number
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_stream=lambda device=None: 0,
        get_device_interface=lambda: torch.cuda,
        map_python_to_cpp_type=lambda name: name,
        get_benchmarker=lambda: lambda *_, **__: [1.0],
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda device=None: properties),
    )
    runtime.driver.set_active(driver)


def pretend_to_torch(card: Card) -> None:
    """Let Inductor write kernels for this card, until the process ends. Nothing can be launched,
    and no tensor on it has memory: use `FakeTensorMode`."""
    pretend_to_triton(card)
    torch._C._ensureCUDADeviceGuardSet()  # before CUDA claims to be there
    properties = _properties(card)
    capability = divmod(card.capability, 10)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: card.name,
        "get_rng_state": lambda device=None: torch.zeros(1),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    interface: Any = importlib.import_module("torch._dynamo.device_interface").CudaInterface
    of_interface: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_compute_capability": lambda device=None: card.capability,
        "get_raw_stream": lambda device=None: 0,
    }
    for name, answer in of_interface.items():
        setattr(interface, name, staticmethod(answer))
    interface.Worker.get_device_properties = staticmethod(lambda device=None: properties)
    interface.Worker.current_device = staticmethod(lambda: 0)
    importlib.import_module("torch.utils._triton").has_triton.cache_clear()


def _properties(card: Card) -> SimpleNamespace:
    """As `torch.cuda.get_device_properties` says it."""
    major, minor = divmod(card.capability, 10)
    return SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        total_memory=card.memory_gib << 30,
        multi_processor_count=card.sms,
        max_threads_per_multi_processor=card.sm_threads,
        max_threads_per_block=1024,
        warp_size=32,
        regs_per_multiprocessor=65_536,
        L2_cache_size=card.l2_mib << 20,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.block_shared,
        shared_memory_per_multiprocessor=card.sm_shared,
        gcnArchName="",
    )
