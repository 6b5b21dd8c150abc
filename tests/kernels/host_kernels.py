"""The CUDA kernels' own source compiled by an ordinary compiler and run on the CPU, differentiable, for tests where no GPU is."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock  # torch brings it
from torch import Tensor

from src.files import sha256
from src.kernels.library import SOURCES, folder_of, keep
from src.wkv.native import INTERVAL
from tests.wkv.inputs import SHAPED_BY_TOKEN

COMPILER = shutil.which("g++")
GUARD = 64  # elements behind every output that must stay as they are
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Shape(ctypes.Structure):
    """As in cpu/arguments.h."""

    _fields_ = [*((name, ctypes.c_int) for name in ("n_sequences", "n_head", "head_size", "total", "interval", "dtype")),
                ("bounds", ctypes.c_void_p), ("host_bounds", ctypes.c_void_p)]


# -O1: the tests spend as long compiling as running.
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-maybe-uninitialized", "-fPIC", "-DWKV_ON_HOST", f"-I{SOURCES['cuda']}",
         f"-I{Path(__file__).parent}", "-x", "c++")


@cache
def library() -> ctypes.CDLL:
    """Compiled by one process, for all others and for later runs too, as long as nothing that it is made of changes."""
    source, shim = Path(__file__).with_suffix(".cpp"), Path(__file__).with_name("host_shim.h")
    compiler = subprocess.run([COMPILER, "-v"], capture_output=True, text=True, check=True).stderr
    folder = folder_of("host_kernels", (compiler, *FLAGS, source.read_text(), shim.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "one_builder"):
        whole = [path for path in folder.glob("kernels-*.so") if path.stem == f"kernels-{sha256(path)[:32]}"]
        loaded = ctypes.CDLL(str(whole[0] if whole else _compile(source, folder)))
    loaded.scratch_bytes.restype = ctypes.c_size_t
    return loaded


def _compile(source: Path, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        jobs = [subprocess.Popen([COMPILER, *FLAGS, "-c", str(path), "-o", str(work / f"{path.stem}.o")])
                for path in (*sorted(SOURCES["cuda"].glob("*.cu")), source)]
        assert not any([job.wait() for job in jobs])
        subprocess.run([COMPILER, "-shared", "-o", str(work / "kernels.so"), *map(str, work.glob("*.o"))], check=True)
        return keep(work / "kernels.so", folder)


def run(version: str, chunked: bool, inputs: dict[str, Tensor], cu_seqlens: Tensor, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """y and the final state of float32 or bfloat16 tokens, differentiable in all inputs."""
    names = (*SHAPED_BY_TOKEN[version], *(("u", "state") if version == "x060" else ("state",)))
    return _Kernel.apply(version, chunked, blocks, cu_seqlens, *(inputs[name] for name in names))


def step(version: str, inputs: dict[str, Tensor], state: Tensor) -> Tensor:
    """y of one token of each sequence; the state moves on in place, and there are no borders."""
    r, y = inputs["r"], _poisoned(inputs["r"])
    names = (*SHAPED_BY_TOKEN[version], *(("u",) if version == "x060" else ()))
    shape = Shape(*r.shape, len(r), INTERVAL, DTYPES[r.dtype], None, None)
    pointers = _pointers([*(inputs[name] for name in names), state, y, state, None])
    assert library().run_step(_number(version), ctypes.byref(shape), pointers) == 0
    _check_guards([y, state])
    return y


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, version, chunked, blocks, cu_seqlens, *inputs):
        r, state = inputs[0], inputs[-1]
        y, final_state = _poisoned(r), _poisoned(state)
        checkpoints = _poisoned(state.new_empty(len(r) // INTERVAL + len(state), *state.shape[1:]))
        _call(version, chunked, False, blocks, cu_seqlens, r, [*inputs, y, final_state, checkpoints])
        without = [_poisoned(r), _poisoned(state)]
        _call(version, chunked, False, blocks, cu_seqlens, r, [*inputs, *without, None])
        torch.testing.assert_close(without, [y, final_state], rtol=0, atol=0, equal_nan=True)
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.how = version, chunked, blocks, cu_seqlens
        return y, final_state

    @staticmethod
    def backward(ctx, d_y, d_final_state):
        version, chunked, blocks, cu_seqlens = ctx.how
        *inputs, state, checkpoints = ctx.saved_tensors
        gradients = [_poisoned(x) for x in inputs]
        if version == "x060":
            gradients[-1] = _poisoned(state.new_empty(len(state), *inputs[-1].shape))
        d_state = _poisoned(state)
        given = [d_y.contiguous(), d_final_state.contiguous()]
        _call(version, chunked, True, blocks, cu_seqlens, inputs[0], [*inputs, checkpoints, *given, *gradients, d_state])
        if version == "x060":
            gradients[-1] = gradients[-1].sum(0)
        return None, None, None, None, *gradients, d_state


def _poisoned(like: Tensor) -> Tensor:
    """Like `like`, all NaN, with a guard behind it."""
    return torch.full((like.numel() + GUARD,), torch.nan, dtype=like.dtype)[:like.numel()].view(like.shape)


def _number(version: str) -> int:
    return 6 if version == "x060" else 7


def _pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    """The kernels' struct of arguments, which has nothing but pointers."""
    assert all(x is None or x.is_contiguous() for x in tensors)
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


def _check_guards(tensors: list[Tensor | None]) -> None:
    for x in tensors:
        base = None if x is None else x._base
        assert base is None or base.dim() > 1 or base[x.numel():].isnan().all(), "written past the end"


def _call(version: str, chunked: bool, backward: bool, blocks: int, cu_seqlens: Tensor, r: Tensor, tensors: list) -> None:
    number, borders = _number(version), cu_seqlens.data_ptr()
    shape = Shape(len(cu_seqlens) - 1, *r.shape[1:], len(r), INTERVAL, DTYPES[r.dtype], borders, borders)
    size = library().scratch_bytes(number, chunked, backward, ctypes.byref(shape), blocks)
    scratch = torch.full((size // 4 + GUARD,), torch.nan)
    status = library().run(number, chunked, backward, ctypes.byref(shape), _pointers(tensors), blocks,
                           ctypes.c_void_p(scratch.data_ptr()))
    assert status == 0 and scratch[size // 4:].isnan().all()
    _check_guards(tensors)
