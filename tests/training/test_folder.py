"""A run's folder: one run at a time, no foreign file lost, and what is damaged told before anything is written."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from src.errors import Stopped, UserError
from src.files import LOCK_FILE, hold_folder
from src.generation.greedy import likeliest_answers
from src.training.checkpoint import check_checkpoint
from src.training.run import train
from tests.cli.conftest import snapshot
from tests.settings import changed
from tests.training.outside import lines
from tests.training.test_run import numbers

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """What it draws takes longer than a run here."""
    monkeypatch.setattr("src.evaluation.report.curve_svgs", lambda *_: [])
    monkeypatch.setattr("src.training.run.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def kept() -> list[Path]:
    """The folder of a run of two epochs, once there is one."""
    return []


@pytest.fixture
def finished(config, prepared, kept, tmp_path_factory):
    """A run of two epochs that is over."""
    run = config(epoch_steps=2, eval_file=str(prepared("x070")), samples=1)
    if not kept:
        train(first := changed(run, proj_dir=str(tmp_path_factory.mktemp("kept") / "run")), {}, likeliest_answers)
        kept.append(Path(first.run.proj_dir))
    shutil.copytree(kept[0], run.run.proj_dir)
    return run


def refused(run, *words: str) -> None:
    """In one line, and nothing changes."""
    before = snapshot(Path(run.run.proj_dir))
    with pytest.raises(UserError) as caught:
        train(run, {}, likeliest_answers)
    assert snapshot(Path(run.run.proj_dir)) == before
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    for word in words:
        assert word in str(caught.value)


# Holders of a folder


def holder(folder: Path) -> subprocess.Popen:
    """Another process that has it, once this returns."""
    code = ("import sys, time; from pathlib import Path; from src.files import LOCK_FILE, hold_folder\n"
            "with hold_folder(Path(sys.argv[1]), '--proj_dir'): print('held', flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_run_and_a_killed_one_leaves_no_lock(config):
    run = config(epoch_steps=1, epoch_count=1)
    process = holder(Path(run.run.proj_dir))
    try:
        for resume in (False, True):
            refused(changed(run, resume=resume), f"{run.run.proj_dir}: another run is writing it", "--proj_dir")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Path(run.run.proj_dir, LOCK_FILE).exists()
    train(run, {})
    assert not Path(run.run.proj_dir, LOCK_FILE).exists()


def test_a_second_run_is_told_before_its_model_is_read(config, tmp_path):
    with hold_folder(Path(config().run.proj_dir), "--proj_dir"), pytest.raises(UserError, match="another run"):
        train(config(load_model=str(tmp_path / "missing.pth")), {})


def test_a_run_that_can_not_begin_leaves_no_folder(config, tmp_path):
    run = config(proj_dir=str(tmp_path / "a" / "b" / "c"), load_model=str(tmp_path / "missing.pth"))
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="missing.pth"):
        train(run, {})
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


@pytest.mark.parametrize("name", [".lock", LOCK_FILE])
def test_a_file_of_somebody_that_has_a_lock_s_name_stays(config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("4711")
    with hold_folder(tmp_path / "run", "--proj_dir"), pytest.raises(UserError, match="another run"):
        train(config(proj_dir=str(tmp_path / "run")), {})
    assert (tmp_path / "run" / name).read_text() == "4711"


@pytest.mark.parametrize("call", ["mkdir", "flock"])
def test_a_signal_while_the_lock_is_taken_leaves_nothing(tmp_path, monkeypatch, call):
    module = fcntl if call == "flock" else os
    before = getattr(module, call)

    def signalled(*arguments):
        before(*arguments)
        monkeypatch.setattr(module, call, before)
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(module, call, signalled)
    with pytest.raises(Stopped), hold_folder(tmp_path / "run", "--proj_dir"):
        pass
    assert not list(tmp_path.rglob("*"))


def test_no_other_process_inherits_the_lock(config, tmp_path):
    with hold_folder(tmp_path, "--proj_dir"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with hold_folder(tmp_path, "--proj_dir"):
            pass
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_a_line_says_so(config, monkeypatch, capsys, reason):
    def flock(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    train(config(epoch_steps=1, epoch_count=1), {})
    said = [line for line in capsys.readouterr().err.splitlines() if "can't be locked" in line]
    assert len(said) == 1 and said[0].startswith(f"warning: {config().run.proj_dir}: can't be locked here")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl", LOCK_FILE, "rwkv-1.safetensors"])
def test_what_is_no_file_is_neither_waited_for_nor_written(config, name, kind):
    run = config(epoch_steps=1, epoch_count=1)
    path = Path(run.run.proj_dir, name)
    path.parent.mkdir()
    {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/null", path)}[kind](path)
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"{name}: cannot be written, since a {kind} has this name"):
            train(changed(run, resume=resume), {})
    assert [path.name for path in path.parent.iterdir()] == [name]


def test_a_link_to_a_file_stays_one(config, tmp_path):
    run = config(epoch_steps=1, epoch_count=1)
    Path(run.run.proj_dir).mkdir()
    Path(run.run.proj_dir, "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    train(run, {})
    assert Path(run.run.proj_dir, "metrics.jsonl").is_symlink() and len(lines(tmp_path / "elsewhere.jsonl")) == 1


@pytest.mark.parametrize(("name", "content"), [("config.json", '{"architectures": ["Rwkv7"]}'), ("config.json", "[1"),
                                               ("eval.jsonl", '{"prompt": "?"}\n'), ("samples.jsonl", "mine\n")])
def test_files_of_no_run_are_not_overwritten(config, name, content):
    run = config()
    Path(run.run.proj_dir).mkdir()
    Path(run.run.proj_dir, name).write_text(content)
    refused(run, name, "belongs to no run", "another --proj_dir")


@pytest.mark.parametrize("name", ["metrics.jsonl", "last.ckpt", "rwkv-final.safetensors"])
def test_what_is_left_of_a_run_is_not_overwritten(finished, name):
    for path in Path(finished.run.proj_dir).iterdir():
        if path.name not in (name, "config.json"):
            path.unlink()
    refused(finished, "already holds a run")


def test_without_its_checkpoint_a_run_does_not_begin_over_its_adapters(finished):
    Path(finished.run.proj_dir, "last.ckpt").unlink()
    refused(changed(finished, resume=True), "last.ckpt is missing", "another --proj_dir")


# Damage


def test_a_bit_that_flipped_anywhere_in_the_checkpoint_is_found(finished):
    path = Path(finished.run.proj_dir, "last.ckpt")
    content = path.read_bytes()
    assert content[-38:-32] == b"sha256" and torch.load(path, weights_only=True)["global_step"] == 4
    for at in (0, 30, 4000, len(content) // 2, len(content) - 200, len(content) - 36, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1:])
        refused(changed(finished, resume=True), "last.ckpt: is damaged", "--load_adapter", "rwkv-2.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"sha256" + bytes(32), "cut", "doubled", "other tensors"])
def test_a_checkpoint_that_is_not_this_runs_is_refused(finished, content):
    path = Path(finished.run.proj_dir, "last.ckpt")
    if content == "other tensors":
        from src.training.checkpoint import SealedFile

        saved = torch.load(path, weights_only=True)
        saved["state_dict"].popitem()
        SealedFile().save_checkpoint(saved, path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-1], "doubled": whole * 2}.get(content, content))
    refused(changed(finished, resume=True), "last.ckpt: is damaged or no file of this run", "--load_adapter")


def test_a_checkpoint_without_a_checksum_is_told_apart_from_a_damaged_one(finished):
    path = Path(finished.run.proj_dir, "last.ckpt")
    path.write_bytes(path.read_bytes()[:-38])
    assert torch.load(path, weights_only=True)["global_step"] == 4
    refused(changed(finished, resume=True), "last.ckpt: has no checksum and was written by an earlier version", "--load_adapter")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_full_memory_is_no_damage(finished, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        check_checkpoint(Path(finished.run.proj_dir, "last.ckpt"), {}, False, lambda: None)


def test_no_adapter_is_read_where_the_checkpoint_is_whole(finished, monkeypatch):
    monkeypatch.setattr("src.training.folder.read_adapter", lambda path: pytest.fail(f"{path} was read"))
    train(changed(finished, resume=True), {}, likeliest_answers)


def test_the_adapter_that_is_named_can_be_read(finished):
    folder = Path(finished.run.proj_dir)
    (folder / "last.ckpt").write_bytes(b"hello")
    (folder / "rwkv-2.safetensors").write_bytes(b"hello")
    refused(changed(finished, resume=True), "--load_adapter", "rwkv-1.safetensors")


@pytest.mark.parametrize("content", [
    b"", b"{", b"5", b"null", b"[]", b'"x"', b"\xff\xfe", b"{}" * 2, b'{"seed": NaN}', b'{"seed": 1' + b"0" * 400 + b"}",
    b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"], ids=lambda content: content[:9].decode(errors="replace"))
def test_a_damaged_configuration_is_told(finished, content):
    Path(finished.run.proj_dir, "config.json").write_bytes(content)
    refused(changed(finished, resume=True), "config.json is missing or damaged")


@pytest.mark.parametrize("value", [None, [], {}, "", "x" * 999, 10**18, 1e300, [[[]]], True])
def test_a_setting_of_another_kind_is_another_run(finished, value):
    path = Path(finished.run.proj_dir, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dpo_beta": value}))
    refused(changed(finished, resume=True), "--resume 1: dpo_beta was", "0.1 now")


def test_an_error_stands_without_warnings_of_the_file_that_it_is_about(finished, tmp_path, capsys):
    pairs = torch.load(finished.data.rlhf_train_file, weights_only=True)
    torch.save(pairs[:-1], other := tmp_path / "other.save")  # and no sidecar
    capsys.readouterr()
    refused(changed(finished, resume=True, rlhf_train_file=str(other)), "rlhf_train_sha256")
    assert capsys.readouterr().err == ""


def test_the_strategy_must_fit_the_checkpoint(finished):
    refused(changed(finished, resume=True, strategy="deepspeed_stage_2"),
            "last.ckpt: was written under a non-DeepSpeed strategy", "--strategy auto")
    Path(finished.run.proj_dir, "last.ckpt").unlink()
    Path(finished.run.proj_dir, "last.ckpt").mkdir()
    refused(changed(finished, resume=True), "last.ckpt: was written under a DeepSpeed strategy")


@pytest.mark.parametrize(("name", "keep", "said"), [
    ("metrics.jsonl", lambda rows: rows[2:], "lacks steps 1-2"), ("metrics.jsonl", lambda rows: [], "lacks steps 1-4"),
    ("metrics.jsonl", lambda rows: rows * 2, "has steps 1-4 more than once, has steps out of order"),
    ("eval.jsonl", lambda rows: rows[::2], "lacks step 2"), ("samples.jsonl", lambda rows: rows[:1], "lacks steps 2, 4"),
    ("metrics.jsonl", lambda rows: [row[:-2] + ', "more": 1}\n' if "2" in row[:10] else row for row in rows], None),
])
def test_gaps_are_said_and_the_run_goes_on(finished, capsys, name, keep, said):
    path = Path(finished.run.proj_dir, name)
    path.write_text("".join(keep(path.read_text().splitlines(keepends=True))))
    content = path.read_bytes()
    Path(finished.run.proj_dir, "report.html").unlink()
    capsys.readouterr()
    train(changed(finished, resume=True), {}, likeliest_answers)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.startswith(f"warning: {path}: {said}; the run continues") for line in warnings] == [True] * bool(said)
    assert path.read_bytes() == content and "Finished after" in Path(finished.run.proj_dir, "report.html").read_text()


def test_growing_files_that_are_gone_are_said(finished, capsys):
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        Path(finished.run.proj_dir, name).unlink()
    capsys.readouterr()
    train(changed(finished, resume=True), {}, likeliest_answers)
    err = capsys.readouterr().err
    assert [f"{name}.jsonl: lacks step" in err for name in ("metrics", "eval", "samples")] == [True] * 3
    assert "metrics.jsonl" not in err.splitlines()[-1] and Path(finished.run.proj_dir, "report.html").exists()


# Room


def test_nothing_is_written_into_the_systems_temporary_folder(config, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    train(config(epoch_steps=1, epoch_count=1), {})


@pytest.mark.parametrize("name", ["config.json", "rwkv-1.safetensors", "last.ckpt", "rwkv-final.safetensors"])
def test_a_full_disk_is_told_of_the_file_and_the_run_goes_on_once_there_is_room(config, tmp_path, name):
    whole = config(epoch_steps=1, proj_dir=str(tmp_path / "whole"))
    train(whole, {})
    run, fsync = config(epoch_steps=1), os.fsync

    def full(descriptor: int) -> None:
        if f"/.{name}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"{name}: cannot be written \(No space left on device\)"):
            train(run, {})
    assert not Path(run.run.proj_dir).exists() or not {LOCK_FILE} & {path.name for path in Path(run.run.proj_dir).iterdir()}
    assert not [path for path in Path(run.run.proj_dir).glob(".*.tmp")]
    train(changed(run, resume=True), {})
    assert numbers(Path(run.run.proj_dir, "metrics.jsonl")) == numbers(Path(whole.run.proj_dir, "metrics.jsonl"))
    final = "rwkv-final.safetensors"
    assert Path(run.run.proj_dir, final).read_bytes() == Path(whole.run.proj_dir, final).read_bytes()


@pytest.mark.parametrize("message", ["can't allocate memory: you tried to allocate 9 bytes", "not enough memory: you tried"])
@pytest.mark.parametrize(("changes", "ways"), [
    ({}, "take a smaller --micro_bsz, --grad_cp 1, --quant 1,"),
    ({"batch_tokens": 300, "grad_cp": True}, "take a smaller --batch_tokens, --quant 1,"),
])
def test_where_memory_runs_out_the_line_says_what_takes_less(config, monkeypatch, message, changes, ways):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: {message}")

    monkeypatch.setattr("src.training.module.pair_losses", fails)
    with pytest.raises(UserError, match=rf"the machine's memory is full; {ways}"):
        train(config(**changes), {})
