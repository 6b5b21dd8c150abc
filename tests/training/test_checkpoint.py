"""last.ckpt by itself: one file, or under DeepSpeed a folder that all processes write; there whole or not at all."""

import hashlib
import json
import os
import shutil
import signal
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, SingleDeviceStrategy

from src.errors import Stopped, UserError
from src.training.checkpoint import (
    SealedFile,
    _exchange,
    check_checkpoint,
    save_checkpoint,
    seal_folder,
    tidy,
    will_be_there,
)

RECORD = {"step": 7, "lines": {"metrics.jsonl": [1, 2], "eval.jsonl": [0]}}
SHAPES = {"blocks.0.lora_a": (4, 300_000), "blocks.0.lora_b": (3,)}
OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
FULL_DISK = RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0")


class Code:
    """A pickle of it writes a file wherever it is loaded without care."""

    def __reduce__(self):
        return open, ("code was here", "w")


def contents(**more) -> dict:
    """As Lightning has them, of five megabytes."""
    return {"state_dict": {f"model.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}, "record": RECORD} | more


def step_of(path: Path, deepspeed: bool = True) -> int:
    return check_checkpoint(path, SHAPES, deepspeed, lambda: None)["step"]


# One file


def test_the_file_is_torch_s_and_a_digest_of_all_before_it(tmp_path):
    path = tmp_path / "last.ckpt"
    SealedFile().save_checkpoint(contents(), path)
    content = path.read_bytes()
    assert content[-38:] == b"sha256" + hashlib.sha256(content[:-38]).digest() and len(content) > 3 << 20
    assert torch.load(path, weights_only=True)["record"] == RECORD
    assert check_checkpoint(path, SHAPES, False, lambda: None) == RECORD
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file_of_this_form_is_read_whoever_wrote_it(tmp_path):
    torch.save(contents(), path := tmp_path / "last.ckpt")
    content = path.read_bytes()
    path.write_bytes(content + b"sha256" + hashlib.sha256(content).digest())
    assert check_checkpoint(path, SHAPES, False, lambda: None) == RECORD
    read = SealedFile().load_checkpoint(path)
    assert read["record"] == RECORD and {tensor.device.type for tensor in read["state_dict"].values()} == {"cpu"}
    elsewhere = SealedFile().load_checkpoint(path, map_location="meta")["state_dict"]
    assert {tensor.device.type for tensor in elsewhere.values()} == {"meta"}
    for number in (0, 1 << 20, (2 << 20) + 5, (3 << 20) - 1, len(content) - 1):  # in every part of what is digested
        path.write_bytes(content[:number] + bytes([content[number] ^ 1]) + content[number + 1:]
                         + b"sha256" + hashlib.sha256(content).digest())
        with pytest.raises(UserError, match="is damaged"):
            step_of(path, deepspeed=False)


@pytest.mark.parametrize("more", [{"state_dict": {}}, {"record": {"step": "7", "lines": {}}}, {"record": None}])
def test_whole_files_with_other_contents_are_refused(tmp_path, more):
    SealedFile().save_checkpoint(contents(**more), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last.ckpt: is damaged or no file of this run.*--load_adapter good.safetensors"):
        check_checkpoint(tmp_path / "last.ckpt", SHAPES, False, lambda: "good.safetensors")
    with pytest.raises(UserError, match="another --proj_dir") as caught:
        check_checkpoint(tmp_path / "last.ckpt", SHAPES, False, lambda: None)
    assert "--load_adapter" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SealedFile().save_checkpoint(contents(code=Code()), "last.ckpt")
    with pytest.raises(UserError, match="is damaged"):
        step_of(Path("last.ckpt"), deepspeed=False)
    with pytest.raises(UnpicklingError):
        SealedFile().load_checkpoint("last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_torch_s_advice_about_foreign_files_is_not_for_users(tmp_path):
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w") as archive:  # which torch takes for TorchScript
        for name, content in (("version", "3"), ("constants.pkl", ""), ("data.pkl", "")):
            archive.writestr(f"archive/{name}", content)
    content = path.read_bytes()
    path.write_bytes(content + b"sha256" + hashlib.sha256(content).digest())
    with warnings.catch_warnings(), pytest.raises(UserError, match="is damaged"):
        warnings.simplefilter("error")
        step_of(path, deepspeed=False)


@pytest.mark.parametrize(("raised", "kind"), [(FULL_DISK, UserError), (OUT_OF_MEMORY, RuntimeError)])
def test_where_torch_can_not_write_the_file_before_stays(tmp_path, monkeypatch, raised, kind):
    path = tmp_path / "last.ckpt"
    SealedFile().save_checkpoint(contents(), path)
    before = path.read_bytes()

    def fails(_, file) -> None:
        file.write(b"half")
        raise raised

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(kind) as caught:
        SealedFile().save_checkpoint(contents(), path)
    assert (caught.value is raised) == (kind is RuntimeError)
    assert kind is RuntimeError or str(caught.value).startswith(f"{path}: cannot be written")
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_lightning_removes_is_gone(tmp_path):
    (tmp_path / "a.ckpt").touch()
    for _ in range(2):
        SealedFile().remove_checkpoint(tmp_path / "a.ckpt")
        assert not list(tmp_path.iterdir())


def test_a_file_that_can_not_be_read_is_told_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"last.ckpt: cannot be read \(No such file or directory\)"):
        step_of(tmp_path / "last.ckpt", deepspeed=False)


# DeepSpeed's folder


def written(folder: Path, step: int) -> Path:
    """As `save_checkpoint` leaves one, with a file of the engine's in it."""
    engine_writes(folder)
    seal_folder(folder, {"step": step, "lines": {}})
    return folder


def engine_writes(folder: Path) -> None:
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "rank_0.pt").write_bytes(bytes(range(99)))


def trainer(write, first: bool = True) -> SimpleNamespace:
    """As a process of a run under DeepSpeed has it; `barriers` counts the times that it waited for the others."""
    class Strategy(DeepSpeedStrategy):
        def __init__(self):
            self.barriers = 0

        def barrier(self) -> None:
            self.barriers += 1

    return SimpleNamespace(strategy=Strategy(), save_checkpoint=write, is_global_zero=first)


@pytest.mark.parametrize("before", [False, True])
def test_the_new_folder_takes_the_place_of_the_old_one(tmp_path, before):
    if before:
        written(tmp_path / "last.ckpt", 1)
    one = trainer(engine_writes)
    save_checkpoint(one, tmp_path, RECORD)
    assert check_checkpoint(tmp_path / "last.ckpt", {}, True, lambda: None) == RECORD and one.strategy.barriers == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_form_of_its_manifest(tmp_path):
    folder = written(tmp_path / "last.ckpt", 5)
    manifest = {"record": {"step": 5, "lines": {}},
                "files": {"checkpoint/rank_0.pt": hashlib.sha256(bytes(range(99))).hexdigest()}}
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_under_other_strategies_lightning_writes_the_file(tmp_path):
    other = SimpleNamespace(strategy=SingleDeviceStrategy(), save_checkpoint=lambda path: path.write_text("whole"))
    save_checkpoint(other, tmp_path, RECORD)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"last.ckpt": "whole"}


def test_only_the_first_process_moves_folders(tmp_path):
    written(tmp_path / "last.ckpt", 1)
    one = trainer(engine_writes, first=False)
    save_checkpoint(one, tmp_path, RECORD)
    assert one.strategy.barriers == 1 and step_of(tmp_path / "last.ckpt") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", ".last.ckpt.tmp"}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(("raised", "reason"), [(OSError(28, "No space left on device"), "No space left on device"),
                                                (FULL_DISK, "writer failed"), (OUT_OF_MEMORY, None)])
def test_where_it_can_not_be_written_the_one_before_stays(tmp_path, first, begun, raised, reason):
    def fails(folder: Path) -> None:
        if begun:
            engine_writes(folder)
        raise raised

    written(tmp_path / "last.ckpt", 1)
    with pytest.raises(UserError if reason else RuntimeError) as caught:
        save_checkpoint(trainer(fails, first), tmp_path, RECORD)
    assert caught.value is raised if reason is None else f"last.ckpt: cannot be written ({reason}" in str(caught.value).replace(
        "torch's ", "")
    left = {"last.ckpt"} | ({".last.ckpt.tmp"} if begun and not (first and reason) else set())
    assert {path.name for path in tmp_path.iterdir()} == left and step_of(tmp_path / "last.ckpt") == 1


def test_a_signal_that_breaks_off_its_writing_stays_one(tmp_path):
    def breaks_off(folder: Path) -> None:
        engine_writes(folder)
        try:
            raise Stopped(signal.SIGTERM)
        except Stopped:
            raise RuntimeError("PytorchStreamWriter failed")  # noqa: B904  # as torch's writer makes of it

    written(tmp_path / "last.ckpt", 1)
    with pytest.raises(Stopped):
        save_checkpoint(trainer(breaks_off), tmp_path, RECORD)
    assert step_of(tmp_path / "last.ckpt") == 1


@pytest.mark.parametrize(("there", "step"), [
    (("last.ckpt",), 1), (("last.ckpt", ".last.ckpt.tmp"), 1), ((".last.ckpt.tmp",), 2),
    ((".last.ckpt.old", ".last.ckpt.tmp"), 2),
    (("last.ckpt", ".last.ckpt.old"), 1), ((".last.ckpt.old",), 0),
])
def test_killed_while_one_takes_the_place_of_another_there_is_one(tmp_path, there, step):
    for name in there:
        written(tmp_path / name, {"last.ckpt": 1, ".last.ckpt.tmp": 2, ".last.ckpt.old": 0}[name])
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] and step_of(tmp_path / "last.ckpt") == step


def test_where_there_is_none_there_is_none_afterwards(tmp_path):
    (tmp_path / ".last.ckpt.tmp").touch()
    tidy(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_is_not_finished_takes_no_place(tmp_path):
    written(tmp_path / ".last.ckpt.old", 0)
    (written(tmp_path / ".last.ckpt.tmp", 2) / "manifest.json").unlink()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] and step_of(tmp_path / "last.ckpt") == 0


def test_leftovers_that_can_not_be_removed_end_no_run(tmp_path, monkeypatch):
    for folder, others in ((tmp_path / "tidied", ".old"), (tmp_path / "exchanged", ".tmp")):
        written(folder / "last.ckpt", 1)
        written(folder / f".last.ckpt{others}", 2)
    unlink = os.unlink

    def refuses(path, **more) -> None:
        if Path(path).name == "rank_0.pt":
            raise PermissionError(13, "Permission denied")
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuses)
    tidy(tmp_path / "tidied")
    _exchange(tmp_path / "exchanged" / "last.ckpt")
    assert step_of(tmp_path / "tidied" / "last.ckpt") == 1 and step_of(tmp_path / "exchanged" / "last.ckpt") == 2


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "checkpoint" / "rank_0.pt").write_bytes(b"x" * 99),
    lambda folder: (folder / "checkpoint" / "rank_0.pt").unlink(),
    lambda folder: (folder / "more").touch(),
    lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "manifest.json").write_text("[" * 10**5),
    lambda folder: (folder / "manifest.json").write_text('{"files": {}, "record": {"step": "1", "lines": {}}}'),
])
def test_damage_is_found(tmp_path, damage):
    damage(written(tmp_path / "last.ckpt", 1))
    with pytest.raises(UserError, match=r"last.ckpt: is damaged .*--load_adapter a.safetensors"):
        check_checkpoint(tmp_path / "last.ckpt", {}, True, lambda: "a.safetensors")


@pytest.mark.parametrize("there", [
    ("last.ckpt",), (".last.ckpt.tmp",), (".last.ckpt.old",), (".last.ckpt.tmp", ".last.ckpt.old"), ()])
def test_another_process_sees_what_the_first_finds_whenever_it_looks(tmp_path, there):
    for name in there:
        written(tmp_path / name, 1)
    assert will_be_there(tmp_path) == bool(there)
    # The first one tidies between any two looks of the other.
    for number in range(3):
        looks = iter(range(9))
        folder = tmp_path / str(number)
        for name in there:
            written(folder / name, 1)

        def look(path, at=number, looks=looks, folder=folder):
            if next(looks) == at:
                tidy(folder)
            return os.path.exists(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "exists", look)
            assert will_be_there(folder) == bool(there)


def test_every_file_and_every_name_is_on_disk_before_the_checkpoint_before_it_goes(tmp_path, monkeypatch):
    written(tmp_path / "last.ckpt", 0)
    done = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append((path.name, to.name)), rename(path, to)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: done.append(path.name))
    written(tmp_path / ".last.ckpt.tmp", 1)
    _exchange(tmp_path / "last.ckpt")
    new, folder = str(tmp_path / ".last.ckpt.tmp"), str(tmp_path)
    assert {new, f"{new}/checkpoint", f"{new}/checkpoint/rank_0.pt"} <= {*done[:done.index(folder)]}
    assert done[done.index(folder):] == [folder, ("last.ckpt", ".last.ckpt.old"), (".last.ckpt.tmp", "last.ckpt"), folder,
                                         ".last.ckpt.old"]
    assert step_of(tmp_path / "last.ckpt") == 1


def test_no_file_stays_open(tmp_path):
    """A run may save thousands."""
    def next_number() -> int:
        os.close(number := os.open(os.devnull, os.O_RDONLY))
        return number

    before = next_number()
    for step in range(3):
        save_checkpoint(trainer(engine_writes), tmp_path, {"step": step, "lines": {}})
    assert next_number() == before
