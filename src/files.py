"""Files that appear whole or not at all: write to a temporary, fsync, rename. Only regular files are ever written."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from src.console import say
from src.errors import NotFinite, UserError

# Not .lock, which other programs use too.
LOCK_FILE = ".train.lock"
# Words that flags for files also take; they never mean a file, even if the current folder has one of that name.
WORDS = {
    "tokenizer": ("world", "bytes"), "layer_profile": ("auto",),
    "template": ("classic", "g1", "g1-think", "g1-think:think", "g1-think:think-a-bit", "g1-think:think-a-lot", "g1-fakethink"),
}


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb", **open_arguments: Any) -> Iterator[IO[Any]]:
    """Open a temporary file next to `path` and rename it to `path` when the block ends without an error.

    An existing file stays untouched until the new one is complete and on disk; if the block fails, the temporary is
    removed. A missing folder is created. A symbolic link stays one, and its target is replaced; a replaced file's
    permissions are kept.

    Raises UserError, naming `path`, if writing fails (full disk, no permission), or `path` is not a regular file.
    """
    path = regular_file(path)
    # The name is known before the file exists, so that it is removed after a signal at any moment.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Private to its owner until it is finished, and locked until it is renamed.
        with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), mode, **open_arguments) as file:
            with suppress(OSError):  # network file systems may not support locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
            os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); {remedy(error)} or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remedy(error: OSError) -> str:
    """What to do about a file that can't be written, as part of a sentence."""
    return "free the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "correct that"


@contextmanager
def open_alone(path: Path, instead: str) -> Iterator[int]:
    """A descriptor of a growing file for reading and appending, locked against other processes; created if missing.

    Args:
        instead: the flag to change, for messages, such as "--output_csv".

    Raises UserError if that fails, another process holds the lock, or `path` is not a regular file.
    """
    path = regular_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another {instead}") from error
    try:
        _lock(descriptor, path, instead)
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, with as many writes as the system needs. Raises OSError."""
    while data:
        data = data[os.write(descriptor, data):]


def append_whole(descriptor: int, data: bytes, sync: bool = True) -> None:
    """Append to a growing file, and with `sync` wait until it is on disk; if that fails, nothing of it is left.

    Raises OSError.
    """
    size = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, data)
        if sync:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def cut_back(descriptor: int, size: int, path: Path) -> None:
    """Truncate a growing file to `size` bytes. Raises UserError, naming `path`, if that fails."""
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


@contextmanager
def hold_folder(folder: Path, instead: str) -> Iterator[None]:
    """Lock a folder against other processes that lock it, by a file in it; a missing folder is created.

    The lock ends with the process, however it ends. Afterwards the file is removed, and so is the folder if it was created
    here and stayed empty.

    Args:
        instead: the flag to change, for messages, such as "--proj_dir".

    Raises UserError if that fails, or another process holds the folder.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    descriptor, path = None, folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = regular_file(path)
        # The holder before removes the file, possibly after it was opened here; a lock on that excludes nobody.
        while descriptor is None or not is_open_as(descriptor, path):
            if descriptor is not None:
                stale, descriptor = descriptor, None
                os.close(stale)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(descriptor, folder, instead)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another {instead}") from error
    except BaseException:
        # Another process holds it, or a signal came, before or after the lock.
        if descriptor is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_empty(descriptor, path)
        raise
    else:
        try:
            yield
        finally:
            with suppress(OSError):  # it may stay in a folder that has become read-only, and locks nobody out
                _remove_empty(descriptor, path)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with suppress(OSError):  # a folder that is not empty
            for made in missing:
                made.rmdir()


def _remove_empty(descriptor: int, path: Path) -> None:
    if not os.fstat(descriptor).st_size:  # else it is somebody's own file
        path.unlink(missing_ok=True)


def is_open_as(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name; it may have been removed by the lock's holder."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, path: Path, instead: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another run is writing it; wait for that one, or choose another {instead}") from None
    except OSError as error:  # network file systems may not support locks
        say(f"warning: {path}: can't be locked here ({error.strerror}); make sure that no other run writes it")


def remove_temporaries(folder: Path, targets: str) -> None:
    """Remove temporaries that killed processes left in a folder, of files whose names match the pattern `targets`.

    A locked one is being written, and stays.
    """
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if re.fullmatch(rf"\.(?:{targets})\.[a-z0-9_]{{8}}\.tmp", path.name) and stat.S_ISREG(path.lstat().st_mode):
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)


def json_text(values: Any, path: str | Path, **options: Any) -> str:
    """`values` as JSON for the file `path`; `options` are those of `json.dumps`.

    Raises NotFinite, naming `path` and the number, for NaN and infinity, which JSON does not have.
    """
    try:
        # A file name that is not UTF-8 has lone surrogates, which can be written only in JSON's form \udcff.
        return json.dumps(values, allow_nan=False, **options).encode(errors="backslashreplace").decode()
    except ValueError:
        raise NotFinite(f"{path}: not written, since {_first_not_finite(values)} is not a finite number") from None


def _first_not_finite(values: Any, name: str = "") -> str | None:
    """The place of the first NaN or infinity, such as `rows[2].weight_decay`."""
    if isinstance(values, float) and not math.isfinite(values):
        return name or "its value"
    inside = []
    if isinstance(values, dict):
        inside = [(f"{name}.{key}".lstrip("."), value) for key, value in values.items()]
    elif isinstance(values, list | tuple):
        inside = [(f"{name}[{place}]", value) for place, value in enumerate(values)]
    return next((found for key, value in inside if (found := _first_not_finite(value, key))), None)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems support this only for files, and the file already has its name
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def regular_file(path: str | Path) -> Path:
    """The target of `path` over symbolic links: a regular file, or a name that is not in use.

    Raises UserError if it is a folder, a device, a pipe or a socket, which a rename would replace by a file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # circular links, a name that is too long or has a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be written ({reason}); choose another name") from None
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISFIFO, "a pipe"),
             (stat.S_ISSOCK, "a socket"))
    for is_kind, kind in kinds:
        if is_kind(mode):
            raise UserError(f"{path}: cannot be written, since {kind} has this name; choose another name")
    return Path(os.path.realpath(path))


def named_file(flag: str, value: str | None) -> str | None:
    """The path in a flag's value, the flag named without dashes; None if it has no value or one of its WORDS."""
    return None if not value or value in WORDS.get(flag, ()) else value


def check_output(path: str | Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Check a job's output file before the job starts, and remove temporaries that killed jobs left next to it.

    Args:
        inputs: files that the job reads, as from `input_files`.

    Raises UserError if `path` is not a regular file, can't be written, or is one of the inputs.
    """
    target = regular_file(path)
    for flag, given in inputs:
        if given.resolve() == target or (target.exists() and given.exists() and target.samefile(given)):
            raise UserError(f"{path}: is also the file of {flag} and would be overwritten; choose another name for the output")
    folder = next(parent for parent in target.parents if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written, since {folder} can't be written to; choose another place")
    remove_temporaries(target.parent, re.escape(target.name))


def sha256(path: str | Path) -> str:
    """The digest of a file's content, in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_file(path: str | Path, what: str) -> Path:
    """Return `path` if it is a readable file; raise UserError naming `what` and the path otherwise."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{what}: {path} does not exist")
    if not path.is_file():
        raise UserError(f"{what}: {path} is not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{what}: {path} cannot be read; check its permissions")
    return path
