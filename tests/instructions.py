"""The suite as on a lesser processor: `pytest --instructions NAME`, for torch, the libraries below it and the project's kernels.

`python -m tests.instructions` prints the sets of instructions below this machine's own, the highest first.
"""

import os
import sys

import torch

from src import kernels
from src.errors import UserError

# What torch reports of each set, and what tells torch and the libraries below it to keep to it. They read that when they first
# compute something. bitsandbytes asks torch; oneDNN multiplies bfloat16, MKL float32: it obeys MKL_CBWR everywhere, but knows
# AVX2 there on Intel's processors only, which is what the other variable is for.
SETS = {
    "avx512bf16": ("AVX512", {}),
    "avx512": ("AVX512", {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
    "avx2": ("AVX2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
    "default": ("DEFAULT", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}),
}
assert tuple(SETS) == kernels.INSTRUCTIONS


def available() -> list[str]:
    """The sets that this processor has, the highest first; "default" is what every processor has."""
    has = {"avx512bf16": torch.cpu._is_avx512_bf16_supported, "avx512": torch.cpu._is_avx512_supported,
           "avx2": torch.cpu._is_avx2_supported, "default": lambda: True}
    return [name for name in SETS if has[name]()]


def use(name: str) -> None:
    """Keep this process and those that it starts to a set; there the kernels have no way but torch's to tell AVX-512's two apart.

    Raises:
        UserError: the set is unknown, this processor has not got it, or torch has computed something already.
    """
    if name not in SETS:
        raise UserError(f"--instructions {name}: unknown; choose one of {', '.join(SETS)}")
    if name not in (here := available()):
        raise UserError(f"--instructions {name}: this processor has not got them; choose one of {', '.join(here)}")
    capability, environment = SETS[name]
    os.environ.update(environment)
    if torch.backends.cpu.get_cpu_capability() != capability:
        raise UserError(f"--instructions {name}: torch uses {torch.backends.cpu.get_cpu_capability()} already; "
                        "unset ATEN_CPU_CAPABILITY, or set the option earlier")
    if kernels.missing("cpu") is None:  # else PyTorch takes the kernels' place
        kernels.use_instructions(name)


if __name__ == "__main__":
    _, *lower = available()
    print(*lower)
    if not lower:
        print("No set of instructions is below this machine's own: there is nothing to run.", file=sys.stderr)
