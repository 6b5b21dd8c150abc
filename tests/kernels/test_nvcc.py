"""Every CUDA source compiles, without a warning, for the oldest architecture; for all of them in the slow tests."""

import shutil
import subprocess
import tempfile
from functools import cache

import pytest

from src.kernels.library import SOURCES

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@cache
def known() -> list[str]:
    """Those of ARCHITECTURES that this compiler has: 100 and 120 came with CUDA 12.8."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [number for number in ARCHITECTURES if f"compute_{number}" in listed]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine's PATH")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", sorted(SOURCES["cuda"].glob("*.cu")), ids=lambda path: path.name)
def test_compiles_for_the_architectures(source, every, request):
    if request.config.getoption("--instructions"):
        pytest.skip("the processor's instructions make no difference to nvcc")
    assert len(known()) >= 4, "an nvcc too old to know today's GPUs"
    # No source asks which architecture it is compiled for, so that only what the oldest lacks makes a difference.
    numbers = known() if every else known()[:1]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    # Little optimized: it is a quarter of the time, and the sources are checked all the same.
    flags = ["-std=c++20", "-Xcicc", "-O1", "-Xptxas", "-O1", "--threads", "2", "-Werror", "all-warnings", *targets]
    with tempfile.TemporaryDirectory() as folder:
        command = [NVCC, *flags, "-c", str(source), "-o", f"{folder}/out.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
