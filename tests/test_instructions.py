"""Keeping the suite to a lower set of instructions."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src import kernels
from src.errors import UserError
from tests import instructions
from tests.conftest import pytest_configure

ROOT = Path(__file__).parents[1]
TOLD = """
import torch
from tests.instructions import use
use("default")
print(torch.backends.cpu.get_cpu_capability(), hasattr(torch.ops.rwkv_wkv, "instructions") and torch.ops.rwkv_wkv.instructions())
"""


def test_torch_and_the_kernels_keep_to_the_set():
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    told = subprocess.run([sys.executable, "-c", TOLD], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["DEFAULT", "False" if kernels.missing("cpu") else "default"]


def test_sets_that_are_not_there_are_reported_in_one_line(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_avx512_supported", "_is_avx2_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)  # as on ARM
    assert instructions.available() == ["default"]
    for name, message in (("avx2", "this processor has not got them; choose one of default"),
                          ("sse9", "unknown; choose one of avx512bf16, avx512, avx2, default")):
        with pytest.raises(UserError, match=f"^--instructions {name}: {message}$"):
            instructions.use(name)
        with pytest.raises(pytest.UsageError, match=f"^--instructions {name}: {message}$"):
            pytest_configure(SimpleNamespace(getoption=lambda option, name=name: name))


@pytest.mark.slow
def test_pytest_says_so():
    done = subprocess.run([sys.executable, "-m", "pytest", "--instructions", "sse9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "Traceback" not in done.stderr
    assert done.stderr.strip() == "ERROR: --instructions sse9: unknown; choose one of avx512bf16, avx512, avx2, default"
