"""Reads and writes checkpoints safely: only tensors, no code is ever run, a file appears whole or not at all.

`.pth`, `.pt` and `.bin` are PyTorch's archives, `.safetensors` is the Hugging Face format. Both are mapped into
memory where possible, so that a checkpoint larger than the RAM opens at once. This module knows nothing about
RWKV; `dimensions.py` recognizes models.
"""

import hashlib
import json
import mmap
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.checkpoint.archive import ZIP, Described, read_content
from src.checkpoint.pickled import BadPickle, NamesCode, NotSupported
from src.errors import UserError, out_of_memory, signal_behind
from src.files import atomic_write, existing_file

TORCH_ENDINGS = (".pth", ".pt", ".bin")
SAFETENSORS_ENDING = ".safetensors"
# Supported types of a checkpoint's tensors, in either format; the names are safetensors'.
SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}

_DEEPSPEED = "_forward_module."
_PIECE = 1 << 22  # values checked at a time
_LARGEST_TABLE = 32 << 20  # bytes of names and shapes; 100 layers have less than 2 MB


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint onto the CPU, mapped from the file where its format allows.

    `path` may omit `.pth`, as users of the `rwkv` package do. Changing a loaded tensor never changes the file. The prefix
    `_forward_module.`, which DeepSpeed puts before every name in checkpoints of RWKV trainers, is removed.

    Raises:
        UserError: the file is missing, empty, cut short, has an unknown ending, holds code or objects, is not a
            plain table of names and tensors, or has a tensor both with and without that prefix.
    """
    path = Path(path)
    if not path.is_file() and Path(f"{path}.pth").is_file():
        path = Path(f"{path}.pth")
    existing_file(path, "checkpoint")
    if path.suffix.lower() == SAFETENSORS_ENDING:
        return load_safetensors(path)[0]
    if path.suffix.lower() not in TORCH_ENDINGS:
        raise UserError(f"checkpoint: {path} ends in none of {', '.join((*TORCH_ENDINGS, SAFETENSORS_ENDING))}; "
                        "rename it to its format")
    weights: dict[str, Tensor] = {}
    for name, tensor in _load_torch(path).items():
        official = name.removeprefix(_DEEPSPEED)
        if official in weights:
            raise UserError(f"checkpoint: {path} holds {official[:100]!r} both with and without the prefix {_DEEPSPEED}; "
                            "get a checkpoint that has each tensor once")
        weights[official] = tensor.detach()
    return weights


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load a `.safetensors` file: its tensors, mapped, on the CPU, and its metadata ({} if it has none).

    Raises UserError if the file is missing, damaged or not of this format.
    """
    existing_file(path, "checkpoint")
    try:
        with Path(path).open("rb") as file:
            said = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise _unreadable(path, error) from None
    if _LARGEST_TABLE < said <= Path(path).stat().st_size:
        raise UserError(f"checkpoint: {path} has {said} bytes of names and shapes alone, more than any model's; get it again")
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(path, error) from None
        raise UserError(f"checkpoint: {path} is not a safetensors file, or is damaged or cut short; get it again") from error
    for name, tensor in weights.items():
        _check_type(name, tensor.dtype, path)
    return weights, metadata


def save_checkpoint(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write `weights` as `.pth` or `.safetensors`, by the ending of `path`, whole or not at all.

    Raises UserError for any other ending, and if writing fails (full disk, no permission).
    """
    path = Path(path)
    if path.suffix.lower() == SAFETENSORS_ENDING:
        save_safetensors(weights, path, {})
        return
    if path.suffix.lower() != ".pth":
        raise UserError(f"{path}: a checkpoint is written as .pth or .safetensors; choose one of these endings")
    weights = {name: _own_storage(tensor) for name, tensor in weights.items()}
    try:
        with atomic_write(path) as file:
            write_archive(weights, file)
    except RuntimeError as error:  # torch's archive writer raises it on a short write
        raise UserError(f"{path}: cannot be written; free the disk or choose another place") from error


def write_archive(content: Any, file: IO[bytes]) -> None:
    """`torch.save`; raises Stopped where a signal breaks it off, of which torch's writer makes a RuntimeError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if stopped := signal_behind(error):
            raise stopped from None
        raise


def save_safetensors(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a `.safetensors` file with string metadata, one tensor after the other, whole or not at all.

    The format is a little-endian u64 length, a JSON header of that length, and the raw tensors end to end. The
    library itself would build the whole file in memory before `atomic_write` could write it.

    Raises UserError if writing fails.
    """
    # Widest elements first, and a header padded to 8 bytes, keep every tensor aligned for readers that map the file.
    names = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + weights[name].nbytes
        header[name] = {"dtype": SAFETENSORS_TYPES[weights[name].dtype], "shape": list(weights[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_raw_bytes(weights[name]))


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of all names, types, shapes and values.

    The same for the same weights in any file format and order. Reads one tensor at a time, without a copy.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        _add_to(digest, name, weights[name])
    return digest.hexdigest()


def fingerprint_if_finite(weights: Mapping[str, Tensor]) -> tuple[str | None, str | None]:
    """`fingerprint` and None, or None and the result of `not_finite`; a mapped file is read once for both."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        wrong = not_finite({name: weights[name]})
        if wrong:
            return None, wrong
        _add_to(digest, name, weights[name])
    return digest.hexdigest(), None


def _add_to(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
    digest.update(_raw_bytes(tensor))


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The first tensor with NaN or infinity, such as "head.weight (3 of 4096 values)"; None if all are finite."""
    for name, tensor in weights.items():
        wrong = sum(map(_count_not_finite, tensor.detach().reshape(-1).split(_PIECE))) if tensor.numel() else 0
        if wrong:
            return f"{name[:100]} ({wrong} of {tensor.numel()} values)"
    return None


@contextmanager
def named_in_utf8(path: str | Path) -> Iterator[str]:
    """A path to the same file for libraries that take only UTF-8; on Linux a name may be any bytes."""
    try:
        name = str(path).encode().decode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
        return
    yield name


def _count_not_finite(values: Tensor) -> int:
    # One-byte types have no isfinite of their own; float16 represents all their values.
    values = values.half() if values.is_floating_point() and values.element_size() == 1 else values
    # A sum is finite only if all values are, and it is fast.
    total = values.sum(dtype=torch.float32 if values.element_size() == 2 else None)
    return 0 if torch.isfinite(total) else values.numel() - int(torch.isfinite(values).sum())


def _load_torch(path: Path) -> dict[str, Tensor]:
    if not path.stat().st_size:
        raise UserError(f"checkpoint: {path} is empty; get it again")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            _check_table(read_content(file, data, _LARGEST_TABLE).value, path)
        with warnings.catch_warnings(), named_in_utf8(path) as name:
            warnings.simplefilter("ignore")  # torch warns of old kinds of files
            # Only the zip archives of torch >= 1.6 can be mapped.
            return torch.load(name, map_location="cpu", weights_only=True, mmap=data[:4] == ZIP)
    except UserError:
        raise
    except NamesCode as error:
        raise UserError(f"checkpoint: {path} holds code ({error.name}) rather than only tensors and is not loaded; "
                        "get a checkpoint that is a plain table of tensors") from None
    except NotSupported as error:
        raise UserError(f"checkpoint: {path} {error}") from None
    except Exception as error:  # on foreign bytes the restricted unpickler raises nearly anything
        if out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(path, error) from None
        reason = str(error) if isinstance(error, BadPickle) else type(error).__name__
        raise UserError(f"checkpoint: {path} is damaged, cut short, or not a PyTorch checkpoint "
                        f"({path.stat().st_size} bytes: {reason}); get it again") from error


def _unreadable(path: str | Path, error: OSError) -> UserError:
    """The system's error for a file that may be intact: too many open files, a failing disk, ..."""
    return UserError(f"checkpoint: {path} cannot be read ({error.strerror or error}); correct that and try again")


def _check_table(loaded: object, path: Path) -> None:
    """Raise UserError if a file's content, with its tensors `Described`, is not names and tensors of `SAFETENSORS_TYPES`."""
    if not isinstance(loaded, dict):
        raise UserError(f"checkpoint: {path} holds a {_kind(loaded)}, not a table of names and tensors")
    if not loaded:
        raise UserError(f"checkpoint: {path} holds no tensors")
    for name, value in loaded.items():
        shown = repr(name)[:100]
        if isinstance(value, dict):
            raise UserError(f"checkpoint: {path} has a nested table under {shown}; save the model's table "
                            "as a file of its own and pass that")
        if not isinstance(name, str) or not isinstance(value, Described):
            raise UserError(f"checkpoint: {path} holds a {_kind(value)} under {shown} where only tensors may be; "
                            "pass a plain checkpoint as released")
        if value.dtype is None:
            raise UserError(f"checkpoint: {path} holds {shown} in a form (sparse, quantized or without data) that is not "
                            "supported; pass a plain checkpoint as released")
        _check_type(name, value.dtype, path)


def _check_type(name: str, dtype: torch.dtype, path: str | Path) -> None:
    if dtype not in SAFETENSORS_TYPES:
        raise UserError(f"checkpoint: {path} holds {name[:100]!r} as {str(dtype).removeprefix('torch.')}, which is not "
                        "supported; pass a plain checkpoint as released")


def _kind(value: object) -> str:
    return "Tensor" if isinstance(value, Described) else type(value).__name__


def _own_storage(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor without spare storage, because torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _raw_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
