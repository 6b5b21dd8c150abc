"""The journal by itself: what it keeps, what it goes on from, and whose file it leaves alone."""

import errno
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

import src.preference.journal as module
from src.errors import NotFinite, UserError
from src.preference.journal import hold_journal, open_journal

DIGEST, OTHER = "0123456789abcdef" * 4, "f" * 64
FIRST, SECOND = [[-1.5, -2.0], [0.0, -0.25]], [[-3.0, -4.0]]


class Stop(Exception):
    pass


def broken_off(path: Path, *batches: tuple[int, list], digest: str = DIGEST, error: Exception | None = None) -> None:
    """A run that appends these batches and then fails."""
    error = error or Stop()
    with pytest.raises(type(error)), hold_journal(path) as descriptor, open_journal(path, descriptor, digest) as journal:
        for number, values in batches:
            journal.append(number, np.array(values))
        raise error


def found(path: Path, digest: str = DIGEST) -> dict:
    """What the next run finds done; it fails too, so that the file stays."""
    with pytest.raises(Stop), hold_journal(path) as descriptor, open_journal(path, descriptor, digest) as journal:
        done = {number: values.tolist() for number, values in journal.done.items()}
        raise Stop
    return done


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "made.save.partial"


def test_what_is_finished_is_found_by_the_next_run_and_the_one_after(path):
    broken_off(path, (0, FIRST))
    broken_off(path, (2, SECOND))
    assert found(path) == found(path) == {0: FIRST, 2: SECOND}
    with hold_journal(path) as descriptor, open_journal(path, descriptor, DIGEST) as journal:
        journal.append(1, np.array([[-0.5, 0.0]]))
        assert {number: values.tolist() for number, values in journal.done.items()} == {0: FIRST, 1: [[-0.5, 0.0]], 2: SECOND}
    assert not path.exists()


def test_the_format(path):
    """The digest in JSON, then batches in JSON, each with the CRC-32 of it."""
    broken_off(path, (0, FIRST), (12, SECOND))
    header, *lines = path.read_bytes().splitlines(keepends=True)
    assert header == f'"{DIGEST}"\n'.encode()
    for line, batch in zip(lines, ([0, FIRST], [12, SECOND]), strict=True):
        text, checksum = line[:-10], line[-10:]
        assert json.loads(text) == batch and checksum == f" {zlib.crc32(text):08x}\n".encode()


@pytest.mark.parametrize("torn", [b"[", b'[3, [[-1.0, -1.0]]] 0123456', b'"'])
def test_a_line_that_was_cut_short_is_gone(path, torn):
    broken_off(path, (0, FIRST))
    with path.open("ab") as file:
        file.write(torn)
    assert found(path) == {0: FIRST}
    broken_off(path, (1, SECOND))
    assert found(path) == {0: FIRST, 1: SECOND}


@pytest.mark.parametrize("start", [b"", b'"', f'"{DIGEST}'.encode(), f'"{DIGEST}"'.encode(), f'"{DIGEST}"\n'.encode(),
                                   f'"{OTHER}"'.encode(), f'"{OTHER}"\n'.encode(), f'"{OTHER}"\n[0, [['.encode()])
def test_a_file_in_which_nothing_is_finished_is_started_anew(path, start):
    path.write_bytes(start)
    broken_off(path, (0, FIRST))
    assert found(path) == {0: FIRST}
    assert path.read_bytes().startswith(f'"{DIGEST}"\n'.encode())


def test_another_computation_s_work_stays(path):
    broken_off(path, (0, FIRST), digest=OTHER)
    before = path.read_bytes()
    with pytest.raises(UserError, match="made.save.partial: was left by an interrupted run with another"):
        broken_off(path)
    assert path.read_bytes() == before


def test_after_an_error_a_file_stays_if_another_run_can_use_it(path):
    for error in (Stop(), KeyboardInterrupt()):
        broken_off(path, error=error)
        assert not path.exists()
    broken_off(path, (0, FIRST), error=KeyboardInterrupt())
    assert found(path) == {0: FIRST}
    broken_off(path, (1, SECOND), error=NotFinite("it would recur"))
    assert not path.exists()


def test_a_batch_that_is_there_twice_is_damage(path):
    broken_off(path, (0, FIRST), (1, SECOND), (0, FIRST))
    with pytest.raises(UserError, match="made.save.partial: is damaged"):
        broken_off(path)
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize(("sizes", "fits"), [
    ([2, 1], True), ([2, 1, 5], True), ([2], False), ([], False), ([2, 2], False), ([1, 1], False)])
def test_batches_of_other_sizes_are_refused(path, sizes, fits):
    with hold_journal(path) as descriptor, open_journal(path, descriptor, DIGEST) as journal:
        for number, values in enumerate((FIRST, SECOND)):
            journal.append(number, np.array(values))
        if fits:
            journal.check(sizes)
        else:
            with pytest.raises(UserError, match="made.save.partial: is damaged"):
                journal.check(sizes)


def test_an_empty_file_goes_with_the_folders_that_were_made_for_it(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    with hold_journal(there / "new" / "deep" / "made.partial"):
        assert (there / "new" / "deep" / "made.partial").exists()
    assert list(tmp_path.iterdir()) == [there] and not list(there.iterdir())
    with hold_journal(there / "made.partial"):
        pass
    assert list(tmp_path.iterdir()) == [there] and not list(there.iterdir())  # though it is empty


def test_a_file_with_something_in_it_stays_and_so_do_full_folders(tmp_path):
    path = tmp_path / "new" / "made.partial"
    with hold_journal(path) as descriptor:
        os.write(descriptor, b"x")
    assert path.read_bytes() == b"x"
    with hold_journal(tmp_path / "other" / "deep" / "made.partial"):
        (tmp_path / "other" / "made.save").touch()
    assert [one.name for one in (tmp_path / "other").iterdir()] == ["made.save"]


def test_a_file_that_somebody_removes_meanwhile_is_no_error(path):
    with hold_journal(path):
        path.unlink()
    assert not path.exists()


def test_one_that_is_held_is_refused_to_others(path):
    said = "another run is writing it; .* choose another --output_save"
    with hold_journal(path), pytest.raises(UserError, match=said), hold_journal(path):
        pass
    with hold_journal(path):
        pass


def test_a_lock_on_a_file_that_was_just_removed_is_no_lock(path, monkeypatch):
    """The holder before removes the file after it was opened here, before it is locked here."""
    removed = []
    is_open_as = module.is_open_as

    def after_its_end(descriptor: int, path: Path) -> bool:
        if len(removed) < 2:
            path.unlink()
            removed.append(os.fstat(descriptor).st_ino)
        return is_open_as(descriptor, path)

    monkeypatch.setattr(module, "is_open_as", after_its_end)
    with hold_journal(path) as descriptor:
        assert len(removed) == 2 and os.path.samestat(os.fstat(descriptor), path.stat())
        with pytest.raises(UserError, match="another run is writing it"), hold_journal(path):
            pass


def test_a_disk_that_is_full_loses_nothing_that_was_finished(path, monkeypatch):
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    broken_off(path, (0, FIRST))
    said = r"made.save.partial: cannot be written \(No space left"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
        patch.setattr(module, "append_whole", full)
        broken_off(path, (1, SECOND))
    assert found(path) == {0: FIRST}
