"""A DeepSpeed run that is broken off: its checkpoint is a folder, written by all processes, and is there whole or not at all."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from src.errors import UserError
from src.training.checkpoint import _exchange, check_checkpoint, seal_folder, tidy, will_be_there
from tests.distributed.test_steps import DEEPSPEED, run


def checkpoint(folder: Path, step: int) -> Path:
    """As `save_checkpoint` leaves one, with a file of the engine's in it."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "rank_0.pt").write_bytes(bytes(range(99)))
    seal_folder(folder, {"step": step, "lines": {}})
    return folder


def step_of(path: Path) -> int:
    return check_checkpoint(path, {}, True, lambda: None)["step"]


@pytest.mark.parametrize(("there", "step"), [
    (("last.ckpt",), 1), (("last.ckpt", ".last.ckpt.tmp"), 1), ((".last.ckpt.tmp",), 2),
    ((".last.ckpt.old", ".last.ckpt.tmp"), 2),
    (("last.ckpt", ".last.ckpt.old"), 1), ((".last.ckpt.old",), 0),
])
def test_killed_while_one_takes_the_place_of_another_there_is_one(tmp_path, there, step):
    for name in there:
        checkpoint(tmp_path / name, {"last.ckpt": 1, ".last.ckpt.tmp": 2, ".last.ckpt.old": 0}[name])
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] and step_of(tmp_path / "last.ckpt") == step


def test_one_that_is_not_finished_takes_no_place(tmp_path):
    checkpoint(tmp_path / ".last.ckpt.old", 0)
    (checkpoint(tmp_path / ".last.ckpt.tmp", 2) / "manifest.json").unlink()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"] and step_of(tmp_path / "last.ckpt") == 0


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "checkpoint" / "rank_0.pt").write_bytes(b"x" * 99),
    lambda folder: (folder / "checkpoint" / "rank_0.pt").unlink(),
    lambda folder: (folder / "more").touch(),
    lambda folder: (folder / "manifest.json").unlink(),
    lambda folder: (folder / "manifest.json").write_text("[" * 10**5),
    lambda folder: (folder / "manifest.json").write_text('{"files": {}, "record": {"step": "1", "lines": {}}}'),
])
def test_damage_is_found(tmp_path, damage):
    damage(checkpoint(tmp_path / "last.ckpt", 1))
    with pytest.raises(UserError, match=r"last.ckpt: is damaged .*--load_adapter a.safetensors"):
        check_checkpoint(tmp_path / "last.ckpt", {}, True, lambda: "a.safetensors")


@pytest.mark.parametrize("there", [
    ("last.ckpt",), (".last.ckpt.tmp",), (".last.ckpt.old",), (".last.ckpt.tmp", ".last.ckpt.old"), ()])
def test_another_process_sees_what_the_first_finds_whenever_it_looks(tmp_path, there):
    for name in there:
        checkpoint(tmp_path / name, 1)
    assert will_be_there(tmp_path) == bool(there)
    # The first one tidies between any two looks of the other.
    for number in range(3):
        looks = iter(range(9))
        folder = tmp_path / str(number)
        for name in there:
            checkpoint(folder / name, 1)

        def look(path, at=number, looks=looks, folder=folder):
            if next(looks) == at:
                tidy(folder)
            return os.path.exists(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "exists", look)
            assert will_be_there(folder) == bool(there)


def test_every_file_and_every_name_is_on_disk_before_the_checkpoint_before_it_goes(tmp_path, monkeypatch):
    checkpoint(tmp_path / "last.ckpt", 0)
    synced, removed = [], []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append((path.name, list(synced))))
    checkpoint(tmp_path / ".last.ckpt.tmp", 1)
    _exchange(tmp_path / "last.ckpt")
    new, ((name, before),) = str(tmp_path / ".last.ckpt.tmp"), removed
    assert name == ".last.ckpt.old" and {new, f"{new}/checkpoint", f"{new}/checkpoint/rank_0.pt", str(tmp_path)} <= set(before)
    assert before[-1] == str(tmp_path) and step_of(tmp_path / "last.ckpt") == 1


@pytest.mark.slow
def test_a_finished_run_gets_back_its_last_files(material, prepared, tmp_path):
    flags = dict(load_model=material / "x070.pth", rlhf_train_file=prepared("x070"), epoch_steps=2, peft="lora", lr_init=1e-3)
    whole = run(tmp_path / "whole", DEEPSPEED, "deepspeed_stage_2", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for name in ("rwkv-final.safetensors", "report.html"):
        (tmp_path / "broken" / name).unlink()
    (tmp_path / "broken" / "last.ckpt").rename(tmp_path / "broken" / ".last.ckpt.tmp")
    again = run(tmp_path / "broken", DEEPSPEED, "deepspeed_stage_2", **flags, resume=1)
    assert again == whole and json.loads((tmp_path / "broken" / "last.ckpt" / "manifest.json").read_text())["record"]["step"] == 1
    assert (tmp_path / "broken" / "report.html").exists()
    adapters = [(tmp_path / name / "rwkv-final.safetensors").read_bytes() for name in ("whole", "broken")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_where_each_process_holds_a_part_the_adapters_are_whole(material, prepared, tmp_path):
    run(tmp_path, DEEPSPEED, "deepspeed_stage_3", load_model=material / "x070.pth", rlhf_train_file=prepared("x070"),
        epoch_steps=2, peft="lora", lr_init=1e-3)
    first, final = (load_file(tmp_path / f"rwkv-{name}.safetensors") for name in ("1", "final"))
    assert all(tensor.numel() and tensor.equal(final[name]) for name, tensor in first.items())
