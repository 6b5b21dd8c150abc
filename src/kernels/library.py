"""The kernels' compiled library: built once by torch's extension builder, kept in its cache, and rebuilt if damaged.

A library's name ends in the digest of its content. Loading a library that a full disk or a crash has cut off would kill the
process at the first access to a missing page (SIGBUS). The digest reveals the damage before that.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from src.console import say
from src.files import sha256
from src.kernels.toolkit import architectures, use_toolkit

_ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"cpu": _ROOT / "cpu", "cuda": _ROOT / "cuda"}
CPU_SOURCES = ("bindings_cpu.cpp", "bindings_decode.cpp", "bindings_sample.cpp", "cpu_memory.cpp", "instructions.cpp",
               "cpu_avx512bf16.cpp", "cpu_avx512.cpp", "cpu_avx2.cpp", "cpu_plain.cpp")
FLAGS = ("-std=c++20", "-O3")
# Without it torch's parallel loops run on one thread; Apple's compiler lacks it.
OPENMP = () if sys.platform == "darwin" else ("-fopenmp",)
CPU_FLAGS = (*FLAGS, *OPENMP, "-ffp-contract=fast", "-Wno-psabi")


def load_library(device: str) -> str | None:
    """Load the kernels for "cpu" or "cuda" as torch's operators, building them if needed; returns the reason if it can't.

    Raises the errors of the system and the builder: OSError, RuntimeError, ImportError.
    """
    name = f"rwkv_wkv_{device}"
    built_with: tuple[str, ...] = ()
    if device == "cuda":
        if torch.version.hip is not None:
            return "they are untested on ROCm"
        if torch.version.cuda is None:
            return "this torch is built for the CPU only"
        toolkit = use_toolkit()
        if isinstance(toolkit, str):
            return toolkit
        built_with = toolkit.version, architectures()
    folder = folder_of(name, built_with)
    if _load_kept(folder, name):
        return None
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found; install g++ 10 or newer"
    folder.mkdir(parents=True, exist_ok=True)
    with _only_builder(folder, device):
        return None if _load_kept(folder, name) else _build(name, device, folder)


def folder_of(name: str, built_with: tuple[str, ...]) -> Path:
    """A folder in the builder's cache for each combination of sources, flags, torch, Python and `built_with`."""
    from torch.utils.cpp_extension import get_default_build_root

    digest = hashlib.sha256(repr((torch.__version__, sys.version, CPU_FLAGS, *built_with)).encode())
    for folder in SOURCES.values():
        for path in sorted(folder.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / f"{name}_{digest.hexdigest()[:16]}"


def keep(built: Path, folder: Path) -> Path:
    """Sync a newly built library and move it to its place, under a name with its digest."""
    with built.open("rb") as file:
        os.fsync(file.fileno())
    kept = folder / f"{built.stem}-{sha256(built)[:32]}.so"
    os.replace(built, kept)
    return kept


@contextmanager
def _only_builder(folder: Path, device: str) -> Iterator[None]:
    from filelock import FileLock, Timeout  # a dependency of torch

    # Unlike the builder's own lock, this one does not outlive a killed process.
    lock = FileLock(folder / "one_builder")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"Waiting for another process to build the WKV kernels for {device} ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _load_kept(folder: Path, name: str) -> bool:
    """Load the cached library, if there is one; a damaged one is removed. Raises OSError for one that can't be loaded."""
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{sha256(path)[:32]}":
            torch.ops.load_library(str(path))
            return True
        say(f"{path}: removed and built again, since it is damaged")
        path.unlink(missing_ok=True)
    return False


def _build(name: str, device: str, folder: Path) -> str | None:
    """Build in a separate folder and move the library into place, so that it is never found half-written."""
    import ninja
    from torch.utils import cpp_extension

    sources = [SOURCES["cpu"] / source for source in CPU_SOURCES] if device == "cpu" else \
        [SOURCES["cuda"] / "bindings_cuda.cpp", *sorted(SOURCES["cuda"].glob("*.cu"))]
    work = folder / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    say(f"Building the WKV kernels for {device}, once (a minute or two) ...")
    path = os.environ.get("PATH")
    # Without an activated environment ninja is installed, but not on the PATH.
    os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, path or os.defpath))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the compiler's version and the architectures, which users can't act on
            cpp_extension.load(name, list(map(str, sources)), build_directory=str(work),
                               extra_cflags=list(CPU_FLAGS), extra_cuda_cflags=list(FLAGS), extra_ldflags=list(OPENMP),
                               with_cuda=device == "cuda", is_python_module=False)
    except (RuntimeError, subprocess.SubprocessError) as error:
        (folder / "build.log").write_text(str(error))
        return f"they could not be built, see {folder / 'build.log'}"
    finally:
        if path is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = path
    keep(work / f"{name}.so", folder)
    shutil.rmtree(work, ignore_errors=True)
    return None
