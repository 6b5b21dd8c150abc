"""Recognizes a file's kind by its first bytes: Parquet and Arrow are readable, many other kinds are named in the refusal.

Nothing is unpickled, and of archives only the members' names are read.
"""

import re
import struct
import zipfile
from pathlib import Path
from typing import IO

from src.data.source import data_ending
from src.errors import UserError

_HEAD = 600  # bytes that suffice
_TABLE = "save it as CSV (UTF-8), JSONL or Parquet"
_TEXTS = "give the texts themselves, as CSV, JSONL or Parquet"
_UNPACK = "unpack it and give a file in it"
_SAVE = ("is a .save file, which is already prepared",
         "give it to train.py --rlhf_train_file or evaluate.py --pairs, and here the CSV, JSONL or Parquet that it was made from")
_TORCH = ("is a file of PyTorch, such as a checkpoint or a .save under another name",
          "rename a .save to its ending, and give texts as CSV, JSONL or Parquet")
_PICKLE = ("is a Python pickle, which is never loaded, since loading can run any code", _TABLE)

# (a file's beginning, what it is, what to do); must not match anything that a CSV's header could begin with.
_KINDS = (
    (rb"\x89HDF\r\n\x1a\n", "is an HDF5 file", _TABLE),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Excel workbook or other Office document", "save it as CSV (UTF-8)"),
    (rb"SQLite format 3\0", "is an SQLite database", "export its table as CSV (UTF-8)"),
    (rb"\x93NUMPY", "is a NumPy array", _TEXTS),
    (rb"\x80[\x02-\x05]", *_PICKLE),
    (rb"PARE[\0-\x08\x0e-\x1f]", "is encrypted Parquet", "save it without encryption"),
    (rb"FEA1\0", "is Feather in its first version", "save it as Parquet, or as Feather in version 2"),
    (rb"ORC[\0-\x08\x0e-\x1f]", "is an ORC file", _TABLE),
    (rb"Obj\x01", "is an Avro file", _TABLE),
    (rb"MMIDIDX\0\0", "is the index of a tokenized corpus (binidx)",
     "give it to train.py --sft 1 with its ending .idx, next to its .bin, and elsewhere the texts themselves, as CSV, JSONL or "
     "Parquet"),
    (rb"GGUF[\x01-\x0f]\0", "is a model in GGUF, not texts", _TEXTS),
    (rb".{3}\0{5}\{", "is a safetensors file, which holds tensors", _TEXTS),
    (rb"%PDF-", "is a PDF", "save its text as CSV or JSONL"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "is a picture", _TEXTS),
    (rb"version https://git-lfs\.github\.com/", "is a Git LFS pointer instead of the file itself", "fetch it (git lfs pull)"),
    (rb".{100}[0-7 \0]{8}.{149}ustar", "is a tar archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "is a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "is a RAR archive", _UNPACK),
    (rb"\x04\x22M\x18", "is compressed with LZ4", "unpack it (lz4 -d), or compress it with gzip"),
    (rb"\x1f\x8b|\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18|\xfd7zXZ\0|BZh[1-9]1AY&SY", "is compressed twice", "unpack it once"),
)
# Texts that are no tables.
_MARKUP = (
    (rb"(?i)\s*<(!doctype html|html|head)\b", "is a web page", "download the file itself, not the page that shows it"),
    (rb"\s*<\?xml\b", "is XML", _TABLE),
    (rb"\{\\rtf", "is a document in RTF", "save it as CSV (UTF-8)"),
)
# Kinds without such a beginning, or with files that lack it.
_ENDINGS = {".save": _SAVE, ".pkl": _PICKLE, ".pickle": _PICKLE, ".orc": ("is an ORC file", _TABLE), ".yaml": ("is YAML", _TABLE),
            ".yml": ("is YAML", _TABLE)}


def check_kind(stream: IO[bytes], path: Path, as_table: bool = True) -> bytes:
    """The first bytes of `stream`. Raises UserError, with the file's kind, if that kind can't be read.

    Args:
        as_table: False if any text is accepted, including markup.
    """
    head = stream.read(_HEAD)
    if is_parquet(head) or is_arrow(head):
        return head
    kinds = (*_KINDS, *_MARKUP) if as_table else _KINDS
    kind = _ENDINGS.get(data_ending(path)) or next((kind for begins, *kind in kinds if re.match(begins, head, re.DOTALL)), None)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind = kind or _zip_kind(stream, data_ending(path))
    if kind:
        raise UserError(f"{path}: {kind[0]}; {kind[1]}")
    return head


def is_parquet(head: bytes) -> bool:
    return re.match(rb"PAR1[\0-\x08\x0e-\x1f]", head) is not None


def is_arrow(head: bytes) -> bool:
    """Arrow's IPC format: its files (Feather is the same) or its streams, which are the `.arrow` of Hugging Face's `datasets`."""
    return head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff"))


def _zip_kind(stream: IO[bytes], ending: str) -> tuple[str, str]:
    """An archive's kind by its members' names, or by its ending if they can't be read."""
    try:
        stream.seek(0)
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, struct.error):
        names = []
    if ending in (".xlsx", ".xlsm", ".xlsb") or any(name.startswith("xl/") for name in names):
        return "is an Excel workbook", "save it as CSV (UTF-8)"
    if ending == ".ods" or "content.xml" in names:
        return "is an OpenDocument file, such as a workbook", "save it as CSV (UTF-8)"
    if ending == ".docx" or any(name.startswith("word/") for name in names):
        return "is a Word document", "save its table as CSV (UTF-8)"
    if any(name.endswith("/data.pkl") for name in names):
        return _TORCH
    if ending == ".npz" or (names and all(name.endswith(".npy") for name in names)):
        return "is an archive of NumPy arrays", _TEXTS
    inside = " ".join(names[0].split())[:80] if len(names) == 1 else f"{len(names)} files" if names else ""
    return "is a zip archive" + (f" ({inside})" if inside else ""), _UNPACK
