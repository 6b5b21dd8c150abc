"""The compiled kernels (kernels/ for the CPU, cuda/ for the card): whether they are here, and what of the processor they use.

They are torch operators, `torch.ops.rwkv_wkv`. Where they can't be built one line says why, and PyTorch's own operators run in
their place.
"""

from functools import cache

import torch

from src.console import say
from src.errors import UserError
from src.kernels.library import load_library
from src.kernels.operators import register

# Sets of instructions that the CPU's kernels are built for, the highest first; as in kernels/instructions.cpp.
INSTRUCTIONS = ("avx512bf16", "avx512", "avx2", "default")


@cache
def missing(device: str) -> str | None:
    """None where the kernels for "cpu" or "cuda" are ready; else the reason, told once on stderr."""
    if device == "cuda" and (reason := missing("cpu")) is not None:
        return reason
    try:
        reason = load_library(device)
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason is not None:
        say(f"The WKV kernels for {device} are not used: {reason}. The recurrence runs in PyTorch meanwhile, several times "
            "slower.")
    elif device == "cpu":
        register()
    return reason


def recycle_memory() -> None:
    """From here on large CPU tensors take the memory of freed ones of like size (kernels/cpu_memory.cpp).

    A training step then peaks a quarter lower than with glibc, whose heap it fills with holes. Does nothing where the kernels
    can't be built.
    """
    if missing("cpu") is None:
        torch.ops.rwkv_wkv.recycle_memory()


def use_instructions(name: str) -> None:
    """From here on the CPU's kernels use this set of instructions, one of INSTRUCTIONS; before, the highest that torch uses here.

    Raises:
        UserError: the set is unknown, this processor has not got it, or the kernels can't be built.
    """
    if name not in INSTRUCTIONS:
        raise UserError(f"instructions {name!r} are unknown; choose one of {', '.join(INSTRUCTIONS)}")
    if (reason := missing("cpu")) is not None:
        raise UserError(f"instructions {name!r} can't be chosen without the kernels: {reason}")
    if name not in (here := torch.ops.rwkv_wkv.available_instructions()):
        raise UserError(f"this processor has no {name!r} instructions; choose one of {', '.join(here)}")
    torch.ops.rwkv_wkv.use_instructions(name)
