"""The compiled kernels (cpu/ for the CPU, cuda/ for the GPU): whether they are available, and which instructions they use.

They are torch operators, `torch.ops.rwkv_wkv`. If they can't be built, one line says why, and PyTorch's own operators run
instead.
"""

from functools import cache

import torch

from src.console import say
from src.errors import UserError
from src.kernels.library import load_library
from src.kernels.operators import register

# Instruction sets that the CPU's kernels are built for, the highest first; the same as in cpu/instructions.cpp.
INSTRUCTIONS = ("avx512bf16", "avx512", "avx2", "default")


@cache
def missing(device: str) -> str | None:
    """None if the kernels for "cpu" or "cuda" are ready; else the reason, printed once on stderr."""
    if device == "cuda" and (reason := missing("cpu")) is not None:
        return reason
    try:
        reason = load_library(device)
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason is not None:
        say(f"The WKV kernels for {device} are not used: {reason}. The recurrence runs in PyTorch instead, several times "
            "slower.")
    elif device == "cpu":
        register()
    return reason


def recycle_memory() -> None:
    """From now on large CPU tensors reuse the memory of freed ones of similar size (cpu/cpu_memory.cpp).

    The peak of a training step is then a quarter lower than with glibc, whose heap it fragments. Does nothing if the kernels
    can't be built.
    """
    if missing("cpu") is None:
        torch.ops.rwkv_wkv.recycle_memory()


def use_instructions(name: str) -> None:
    """From now on the CPU's kernels use this instruction set, one of INSTRUCTIONS; by default, the highest that torch uses here.

    Raises:
        UserError: the set is unknown, this processor lacks it, or the kernels can't be built.
    """
    if name not in INSTRUCTIONS:
        raise UserError(f"instructions {name!r} are unknown; choose one of {', '.join(INSTRUCTIONS)}")
    if (reason := missing("cpu")) is not None:
        raise UserError(f"instructions {name!r} can't be chosen without the kernels: {reason}")
    if name not in (here := torch.ops.rwkv_wkv.available_instructions()):
        raise UserError(f"this processor has no {name!r} instructions; choose one of {', '.join(here)}")
    torch.ops.rwkv_wkv.use_instructions(name)
