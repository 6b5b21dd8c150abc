"""last.ckpt, the checkpoint that `--resume 1` continues from: written whole, with digests that reveal damage before any work.

It is one file: PyTorch's archive, then 38 bytes, `sha256` and the digest of everything before them. A zip archive may have bytes
appended, so `torch.load` reads the file as it is. Under DeepSpeed, whose engine writes from all processes, it is a folder, and
its manifest.json holds the digest of every other file.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO

from src.checked_json import BadJson, parse_json
from src.checkpoint.io import named_in_utf8, write_archive
from src.errors import UserError, out_of_memory, signal_behind
from src.files import atomic_write, json_text, sha256
from src.run_files import RESUME_FILE

MANIFEST_FILE = "manifest.json"
RECORD = "record"
MARK = b"sha256"
DIGEST_SIZE = 32
DAMAGED = "is damaged or no file of this run"
UNSEALED = "has no checksum and was written by an earlier version or for another run"
# The end of a zip archive with nothing appended.
END_MARK, END_SIZE = b"PK\5\6", 22
# A checkpoint's progress: optimizer steps, and for each growing file the steps of its lines.
RECORD_SHAPE = {"step": int, "lines": {str: [int]}}


class SealedFile(CheckpointIO):
    """Lightning's reader and writer of the one file, without its copies in memory and in the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with atomic_write(path, "w+b") as file:
                write_archive(checkpoint, file)
                file.seek(0)
                digest = hashlib.file_digest(cast(io.BufferedRandom, file), "sha256").digest()
                file.write(MARK + digest)
        except RuntimeError as error:  # torch's archive writer raises it on a short write
            if out_of_memory(error):
                raise
            raise UserError(f"{path}: cannot be written; free the disk, then continue with --resume 1") from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def save_checkpoint(trainer: pl.Trainer, folder: Path, record: dict[str, Any]) -> None:
    """Write last.ckpt in a run's folder, from all processes; raises UserError if that fails."""
    final = folder / RESUME_FILE
    if not isinstance(trainer.strategy, pl.strategies.DeepSpeedStrategy):
        trainer.save_checkpoint(final)
        return
    written = _beside(final, "tmp")
    try:
        trainer.save_checkpoint(written)
        if trainer.is_global_zero:
            seal_folder(written, record)
            _exchange(final)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if stopped := signal_behind(error):
            raise stopped from None
        if out_of_memory(error):
            raise
        if trainer.is_global_zero:
            shutil.rmtree(written, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else "torch's writer failed"
        raise UserError(f"{final}: cannot be written ({reason}); free the disk, then continue with --resume 1") from error
    trainer.strategy.barrier()


def will_be_there(folder: Path) -> bool:
    """Whether `tidy` leaves a checkpoint; correct even while another process is tidying."""
    final = folder / RESUME_FILE
    # In this order, a folder that is renamed between two checks is found under its new name.
    return (_beside(final, "tmp") / MANIFEST_FILE).exists() or _beside(final, "old").is_dir() or final.exists()


def tidy(folder: Path) -> None:
    """Finish or undo a replacement of DeepSpeed's folder that a kill interrupted, so that one checkpoint is there."""
    final = folder / RESUME_FILE
    written, before = _beside(final, "tmp"), _beside(final, "old")
    if not final.exists():
        if (written / MANIFEST_FILE).exists():
            written.rename(final)
        elif before.is_dir():
            before.rename(final)
    for left in (written, before):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def check_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]], deepspeed: bool,
                     good: Callable[[], str | None]) -> dict[str, Any]:
    """The record of a checkpoint that is intact, holds these tensors, and was written under this kind of strategy.

    Args:
        shapes: of the trained tensors, by name. DeepSpeed keeps its tensors in pieces, which are not checked.
        good: finds an adapter that a new run could start from instead; called only if the checkpoint is refused.

    Raises UserError for any other checkpoint.
    """
    if path.is_dir() != deepspeed:
        writer, strategy = ("a DeepSpeed", "its --strategy") if path.is_dir() else ("a non-DeepSpeed", "--strategy auto")
        raise UserError(f"{path}: was written under {writer} strategy; resume with {strategy}")
    try:
        record = _read_folder(path) if deepspeed else _read_file(path, shapes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if isinstance(record, str):
        elsewhere = f" and continue from the last good adapter with --load_adapter {adapter}" if (adapter := good()) else ""
        raise UserError(f"{path}: {record}, so --resume 1 can't continue from it; choose another --proj_dir{elsewhere}")
    return record


def _read_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any] | str:
    """The record; or what is wrong, if the file has changed since it was written or holds other tensors."""
    size = path.stat().st_size - len(MARK) - DIGEST_SIZE
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, 1 << 20):
            digest.update(file.read(min(1 << 20, size - start)))
        if file.read() != MARK + digest.digest():
            file.seek(max(0, size + len(MARK) + DIGEST_SIZE - END_SIZE))
            return UNSEALED if file.read().startswith(END_MARK) else DAMAGED
    try:
        with warnings.catch_warnings(), named_in_utf8(path) as name:
            warnings.simplefilter("ignore")
            found = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
        held = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in found["state_dict"].items()}
        return parse_json(json.dumps(found[RECORD]), RECORD_SHAPE) if held == shapes else DAMAGED
    except (RuntimeError, UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:  # foreign
        if out_of_memory(error):
            raise
        return DAMAGED


def _read_folder(path: Path) -> dict[str, Any] | str:
    """The record; or what is wrong, if a file is missing or has changed since it was written."""
    try:
        manifest = parse_json((path / MANIFEST_FILE).read_bytes(), {"files": {str: str}, RECORD: RECORD_SHAPE})
    except (FileNotFoundError, BadJson):
        return DAMAGED
    return manifest[RECORD] if manifest["files"] == _digests(path) else DAMAGED


def seal_folder(path: Path, record: dict[str, Any]) -> None:
    """Sync all files of a folder, so that they survive a power cut, and write its manifest last."""
    for part in (path, *path.rglob("*")):
        _sync(part)
    text = json_text({RECORD: record, "files": _digests(path)}, path / MANIFEST_FILE, indent=2)
    with atomic_write(path / MANIFEST_FILE, "w", encoding="utf-8") as file:
        file.write(text)


def _digests(path: Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MANIFEST_FILE)
    return {str(file.relative_to(path)): sha256(file) for file in files}


def _exchange(final: Path) -> None:
    """Replace the old folder by the new one; a single rename does not replace a folder that is not empty."""
    before = _beside(final, "old")
    _sync(final.parent)  # the new name reaches the disk before the old one goes
    if final.exists():
        final.rename(before)
    _beside(final, "tmp").rename(final)
    _sync(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def _sync(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(final: Path, ending: str) -> Path:
    return final.with_name(f".{final.name}.{ending}")
