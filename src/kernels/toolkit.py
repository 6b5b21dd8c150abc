"""The CUDA toolkit that extensions are built with: found by its headers, since an `nvcc` on the PATH may be elsewhere."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch


class Toolkit(NamedTuple):
    home: Path  # has bin/nvcc and include/cuda_runtime.h
    version: str  # of nvcc, such as "13.0"


def find_toolkit() -> Toolkit | str:
    """The first complete toolkit among CUDA_HOME, CUDA_PATH, nvcc's own folder and /usr/local/cuda; else what is missing.

    Distributions and containers put a script or a link called nvcc on the PATH, whose parent folder has no headers; so nvcc's
    own dry run is asked for its folder.
    """
    looked = []
    for home in _candidates():
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            version = _version(home / "bin" / "nvcc")
            if version.split(".")[0] != (torch.version.cuda or "").split(".")[0]:
                return (f"nvcc in {home} is of CUDA {version}, but torch of {torch.version.cuda}; install the toolkit of torch's "
                        "version, or set CUDA_HOME to it")
            return Toolkit(home, version)
        looked.append(str(home))
    return (f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found (looked in {', '.join(looked)}); install the "
            "one of torch's CUDA version, or set CUDA_HOME to it")


def use_toolkit() -> Toolkit | str:
    """`find_toolkit`; from now on the extension builders of torch and DeepSpeed use the toolkit that it found, if any.

    The builder's own search stops at the parent of any nvcc.
    """
    toolkit = find_toolkit()
    if isinstance(toolkit, Toolkit):
        from torch.utils import cpp_extension

        cpp_extension.CUDA_HOME = str(toolkit.home)
    return toolkit


def architectures() -> str:
    """The architectures that torch's builder builds extensions for: TORCH_CUDA_ARCH_LIST, or those of the visible GPUs."""
    visible = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{major}.{minor}" for major, minor in sorted(visible))


def _candidates() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parents[1]
        # Its dry run prints the folder of the program behind a script.
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        for folder in re.findall(r"^#\$ _HERE_=(.+)$", dry, re.MULTILINE):
            yield Path(folder).parent
    yield Path("/usr/local/cuda")


def _version(nvcc: Path) -> str:
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    return match[1] if match else "0.0"
