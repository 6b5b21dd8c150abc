"""Read and write checkpoints safely: tensors only, no code is ever run, a file appears whole or not at all.

`.pth`, `.pt` and `.bin` are PyTorch's archives, `.safetensors` is the Hugging Face format. Both are mapped into
memory where they can be, so that a checkpoint larger than the RAM opens at once. This module knows nothing of
RWKV; `dimensions.py` tells what a checkpoint is.
"""

import hashlib
import json
import pickle
import pickletools
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from src.errors import UserError
from src.files import atomic_write, existing_file

TORCH_ENDINGS = (".pth", ".pt", ".bin")
SAFETENSORS_ENDING = ".safetensors"
SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint onto the CPU, mapped from the file where its format allows.

    `path` may leave out `.pth`, as users of the `rwkv` package do. Changing a loaded tensor never changes the file. The prefix
    `_forward_module.`, which DeepSpeed puts before every name in the checkpoints of this family's trainers, is taken off.

    Raises:
        UserError: the file is missing, empty, cut short, of an unknown ending, holds code or objects, or is not a
            plain table of names and tensors.
    """
    path = Path(path)
    if not path.is_file() and Path(f"{path}.pth").is_file():
        path = Path(f"{path}.pth")
    existing_file(path, "checkpoint")
    if path.suffix.lower() == SAFETENSORS_ENDING:
        return load_safetensors(path)[0]
    if path.suffix.lower() not in TORCH_ENDINGS:
        raise UserError(f"checkpoint: {path} ends in none of {', '.join((*TORCH_ENDINGS, SAFETENSORS_ENDING))}; "
                        "rename it to what it is")
    return {name.removeprefix("_forward_module."): tensor for name, tensor in _tensors_only(_load_torch(path), path).items()}


def load_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load a `.safetensors` file: its tensors, mapped, on the CPU, and its metadata ({} where it has none).

    Raises UserError where the file is missing, damaged or not of this format.
    """
    existing_file(path, "checkpoint")
    try:
        with _named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"checkpoint: {path} is not a safetensors file, or is damaged or cut short; get it again") from error


def save_checkpoint(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write `weights` as `.pth` or `.safetensors`, by the ending of `path`, whole or not at all.

    Raises UserError for any other ending, and where the system refuses to write (full disk, no permission).
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
            torch.save(weights, file)
    except RuntimeError as error:  # what torch's archive writer raises when a write falls short
        raise UserError(f"{path}: cannot be written; free the disk or choose another place") from error


def save_safetensors(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write a `.safetensors` file with string metadata, one tensor after the other, whole or not at all.

    The format is a little-endian u64 length, a JSON header of that length, and the raw tensors end to end. The
    library itself would build the whole file in memory before `atomic_write` could write it.

    Raises UserError where the system refuses to write.
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
        tensor = weights[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The first tensor with NaN or infinity in it, such as "head.weight (3 of 4096 values)"; None where all are finite."""
    for name, tensor in weights.items():
        values = tensor.detach()
        # The types of one byte have no isfinite of their own; float16 represents all their values.
        values = values.half() if values.is_floating_point() and values.element_size() == 1 else values
        wrong = values.numel() - int(torch.isfinite(values).sum())
        if wrong:
            return f"{name} ({wrong} of {values.numel()} values)"
    return None


@contextmanager
def _named_in_utf8(path: str | Path) -> Iterator[str]:
    """A path to the same file for libraries that take UTF-8 alone, where Linux lets names be any bytes."""
    try:
        name = str(path).encode().decode()
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"
        return
    yield name


def _load_torch(path: Path) -> object:
    with path.open("rb") as file:
        magic = file.read(4)
    if not magic:
        raise UserError(f"checkpoint: {path} is empty; get it again")
    try:
        with warnings.catch_warnings(), _named_in_utf8(path) as name:
            warnings.simplefilter("ignore")  # torch warns of an archive before it refuses it, and the refusal says it all
            # Only the zip archives of torch >= 1.6 can be mapped.
            return torch.load(name, map_location="cpu", weights_only=True, mmap=magic == b"PK\x03\x04")
    except Exception as error:  # foreign bytes make the restricted unpickler fail in every way there is
        what = _refused_code(path, error)
        if what is not None:
            raise UserError(f"checkpoint: {path} holds code ({what}) rather than only tensors and is not loaded; "
                            "get a checkpoint that is a plain table of tensors") from error
        # The unpickler's own messages advise to load the file unsafely.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {' '.join(str(error).split())[:100]}"
        raise UserError(f"checkpoint: {path} is damaged, cut short, or not a PyTorch checkpoint "
                        f"({path.stat().st_size} bytes{reason}); get it again") from error


def _refused_code(path: Path, error: Exception) -> str | None:
    """Name the code that made `torch.load` refuse the file; None where there is none, and the file is just broken."""
    refused = re.search(r"GLOBAL ([\w.]+) (?:was not an allowed|whose module)", str(error))
    if refused:
        return refused[1]
    if "TorchScript" in str(error):
        return "TorchScript"
    # A pickle that torch did not write fails at its first bytes, before any name in it is looked at.
    with path.open("rb") as file:
        beginning = file.read(1 << 20)
    try:
        for opcode, _, _ in pickletools.genops(beginning):  # parses, runs nothing
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE"):
                return "a pickled object"
    except ValueError:
        pass
    return None


def _tensors_only(loaded: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise UserError(f"checkpoint: {path} holds a {type(loaded).__name__}, not a table of names and tensors")
    if not loaded:
        raise UserError(f"checkpoint: {path} holds no tensors")
    for name, value in loaded.items():
        if isinstance(value, dict):
            raise UserError(f"checkpoint: {path} keeps a table of its own under {name!r}; save the model's table alone "
                            "as a file of its own and pass that")
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"checkpoint: {path} holds a {type(value).__name__} under {name!r} where only tensors may be; "
                            "pass a plain checkpoint as released")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"checkpoint: {path} holds {name!r} in a form (sparse, quantized or without data) that is not "
                            "served; pass a plain checkpoint as released")
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _own_storage(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor without spare storage, because torch.save writes the whole storage behind a view."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _raw_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
