"""Only regular files are written, whole or not at all; what a name leads to is what counts."""

import os
import socket
import stat
from pathlib import Path

import pytest

from src.errors import Stopped, UserError
from src.files import atomic_write, check_output, open_alone, regular_file


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name has a hundred characters at most
    try:
        with socket.socket(socket.AF_UNIX) as found:
            found.bind(path.name)
    finally:
        os.chdir(here)


KINDS = {
    "a folder": Path.mkdir, "a pipe": os.mkfifo, "a socket": a_socket, "a device": device,
    "a device behind a link": lambda path: path.symlink_to("/dev/null"),
    "a folder behind a link": lambda path: path.symlink_to(path.parent), "links in a circle": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_by_every_writer(tmp_path, kind):
    path = tmp_path / "out.pth"
    KINDS[kind](path)
    before = os.lstat(path)
    words = rf"out\.pth: cannot be written, since {kind.removesuffix(' behind a link')} has this name; choose another name"
    words = r"out\.pth: cannot be written \(Too many levels" if "circle" in kind else words
    with pytest.raises(UserError, match=words):
        regular_file(path)
    with pytest.raises(UserError, match=words):
        check_output(path, [])
    with pytest.raises(UserError, match=words), atomic_write(path) as file:
        file.write(b"x")
    with pytest.raises(UserError, match=words), open_alone(path, "--output_csv"):
        pass
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.pth"]


@pytest.mark.parametrize("target_exists", [True, False])
def test_a_link_is_followed_and_stays_one(tmp_path, target_exists):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "model.pth", tmp_path / "link.pth"
    link.symlink_to(target)
    if target_exists:
        target.write_bytes(b"before")
    with atomic_write(link) as file:
        file.write(b"after")
        assert target.exists() == target_exists and (not target_exists or target.read_bytes() == b"before")
    assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == b"after"
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    with open_alone(link, "--output_csv") as descriptor:
        os.write(descriptor, b" and more")
    assert link.is_symlink() and target.read_bytes() == b"after and more"


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "private.pth"
    path.write_bytes(b"before")
    path.chmod(0o600)
    with atomic_write(path) as file:
        file.write(b"after")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "new.pth") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.pth").stat().st_mode) == 0o640


@pytest.mark.parametrize("how", ["same", "link", "hard link", "other way there"])
def test_an_output_is_no_input(tmp_path, how):
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_bytes(b"prompt,chosen\n")
    if how == "link":
        output.symlink_to(source)
    elif how == "hard link":
        os.link(source, output)
    else:
        output = source if how == "same" else tmp_path / "sub" / ".." / "in.csv"
        (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="is also the file of --input_csv and would be overwritten"):
        check_output(output, [("--load_model", tmp_path / "none.pth"), ("--input_csv", source)])


def test_a_place_that_can_not_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out\.pth: cannot be written \(Not a directory\)"):
        check_output(tmp_path / "file" / "sub" / "out.pth", [])
    check_output(tmp_path / "new" / "folders" / "out.pth", [])
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="locked can't be written to"):
        check_output(tmp_path / "locked" / "out.pth", [])


def test_a_name_that_no_system_takes(tmp_path):
    with pytest.raises(UserError, match="cannot be written .*too long"):
        check_output(tmp_path / ("x" * 300), [])
    with pytest.raises(UserError, match="cannot be written .*null"):
        check_output(str(tmp_path / "a\0b"), [])


def test_what_a_killed_process_left_goes_and_what_another_is_writing_stays(tmp_path):
    path = tmp_path / "out+.save"
    stale = tmp_path / ".out+.save.0a1b2c3d.tmp"
    others = [".out+.save.json.0a1b2c3d.tmp", ".out+.save.tmp", ".outt.save.0a1b2c3d.tmp"]
    for name in (stale.name, *others):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / ".out+.save.00000000.tmp")
    with atomic_write(path) as file:
        file.write(b"whole")
        check_output(path, [])
        assert not stale.exists() and all((tmp_path / name).exists() for name in others)
    assert path.read_bytes() == b"whole"


@pytest.mark.parametrize("moment", ["open", "fsync", "chmod", "replace"])
def test_a_signal_at_any_moment_leaves_no_temporary(tmp_path, monkeypatch, moment):
    call = getattr(os, moment)

    def signalled(*arguments, **named):
        call(*arguments, **named)
        raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, signalled)
        with pytest.raises(Stopped), atomic_write(tmp_path / "out") as file:
            file.write(b"whole")
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if moment == "replace" else [])
