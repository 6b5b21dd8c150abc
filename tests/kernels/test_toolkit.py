"""Finding the CUDA toolkit among the folders that machines have; every nvcc here is a script that says what a real one says."""

from pathlib import Path

import pytest
import torch

from src.kernels.library import folder_of
from src.kernels.toolkit import architectures, find_toolkit

SAYS = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--dryrun) printf '#$ _SPACE_= \\n#$ _HERE_={here}\\n' >&2 ;;
esac
"""


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine with nothing on its PATH, and torch for CUDA 13.0."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def program(path: Path, version: str, here: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SAYS.format(version=version, here=here))
    path.chmod(0o755)


def toolkit(home: Path, version: str = "13.0", headers: bool = True) -> Path:
    program(home / "bin" / "nvcc", version, home / "bin")
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_variables_come_first(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, str(toolkit(tmp_path / "named")))
    monkeypatch.setenv("PATH", str(toolkit(tmp_path / "other") / "bin"))
    assert find_toolkit() == (tmp_path / "named", "13.0")


def test_a_folder_without_headers_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "runtime_only", headers=False)))
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "whole")))
    assert find_toolkit().home == tmp_path / "whole"


def test_a_script_on_the_path_leads_to_the_toolkit_behind_it(tmp_path):
    program(tmp_path / "bin" / "nvcc", "13.0", toolkit(tmp_path / "opt" / "cuda") / "bin")
    assert find_toolkit().home == tmp_path / "opt" / "cuda"


def test_a_link_on_the_path_is_followed(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(toolkit(tmp_path / "opt" / "cuda") / "bin" / "nvcc")
    assert find_toolkit().home == tmp_path / "opt" / "cuda"


def test_a_toolkit_of_another_cuda_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "12.8")))
    assert find_toolkit() == (f"nvcc in {tmp_path} is of CUDA 12.8, but torch of 13.0; install the toolkit of torch's version, "
                              "or set CUDA_HOME to it")


def test_where_none_is_the_places_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert find_toolkit() == (f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h was found (looked in {tmp_path}, "
                              "/usr/local/cuda); install the one of torch's CUDA version, or set CUDA_HOME to it")


def test_a_build_is_kept_for_its_compiler_and_architectures_alone(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert architectures() == "8.0;9.0"
    folders = [folder_of("kernels", built_with) for built_with in (("13.0", "9.0"), ("13.1", "9.0"), ("13.0", "8.0"), ())]
    assert len(set(folders)) == 4
