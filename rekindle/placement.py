"""Sets a model up on a machine: device, sharding, micro-batch size, compilation, DDP."""

import dataclasses
import logging
from typing import cast

import torch
from torch import nn

from rekindle.errors import UserError
from rekindle.machine import Machine
from rekindle.model import LanguageModel, fp8
from rekindle.model.compute import Compute, Forward
from rekindle.runtime import distributed
from rekindle.runtime.device import Device
from rekindle.runtime.distributed import World
from rekindle.runtime.micro_batch import choose_micro_batch, must_recompute
from rekindle.runtime.sharding import is_sharded, shard


def move(model: LanguageModel, machine: Machine, device: Device, world: World) -> None:
    """Move `model` from the CPU to the device, or shard it over the ranks' devices. A GPU may not
    have enough memory for the full model, so it must not be moved there before it is sharded."""
    if machine.shard and world.size > 1:
        shard(model, device.torch, world)
    else:
        cast(nn.Module, model).to(device.torch)


def data_parallel(model: LanguageModel, compiled: Forward, device: Device, world: World) -> Forward:
    """Wrap the compiled model in DDP if there are several ranks. A sharded model averages its
    gradients itself and is returned unchanged."""
    if is_sharded(model):
        return compiled
    return distributed.data_parallel(cast(nn.Module, compiled), world, device.torch)


def choose_memory_use(
    machine: Machine,
    model: LanguageModel,
    compute: Compute,
    rows: int,
    T: int,
    device: Device,
    world: World,
) -> Machine:
    """Decide what depends on the device's memory: activation checkpointing and the micro-batch
    size. Returns `machine` with both filled in.

    `rows`: sequences per global batch; `T`: tokens per sequence. Raises `UserError` if the model's
    head cannot be computed in FP8, but should be.
    """
    if compute.fp8_head and (reason := fp8.unsupported(model, T)):
        raise UserError(f"--fp8-head: {reason}; leave it out")
    recompute = machine.recompute
    if recompute is None:
        recompute = must_recompute(model, T, device, world, compiled=machine.compile)
    model.use(dataclasses.replace(compute, recompute=recompute))
    micro_batch = machine.micro_batch or choose_micro_batch(
        model, rows, T, device, world, compiled=machine.compile
    )
    return dataclasses.replace(machine, recompute=recompute, micro_batch=micro_batch)


def compile_model(model: LanguageModel, machine: Machine) -> Forward:
    """The compiled model, or `model` itself if `machine.compile` is False. They share their
    parameters, and the parameter names of `model` do not change."""
    if not machine.compile:
        return model
    # It warns about a CUDA toolkit without a GPU, which is irrelevant on a CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return torch.compile(cast(nn.Module, model), fullgraph=True, dynamic=False)
