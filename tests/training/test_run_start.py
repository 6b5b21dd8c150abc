"""How a run starts, up to what Lightning is given to train: its processes, its checks, and what it says first."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import src.training.run as run_file
from src.adapters.files import adapter_tensors
from src.checkpoint.io import load_checkpoint
from src.errors import UserError
from src.files import LOCK_FILE
from src.training.environment import First
from src.training.run import train
from src.training.watching import Samples
from tests.training.test_environment import BY_HAND


def answer(*_) -> list:
    return []


@pytest.fixture
def in_place_of_a_run(monkeypatch):
    """What `train` does around a run, which itself only says a line; the lines beforehand are kept."""
    kept = SimpleNamespace(notes=None, locked=None, error=None)

    def stand_in(config, environment, expected, answer, notes) -> None:
        print("a line", file=sys.stderr)
        kept.notes, kept.locked = notes, Path(config.run.proj_dir, LOCK_FILE).exists()
        if kept.error:
            raise kept.error

    monkeypatch.setattr(run_file, "_train", stand_in)
    return kept


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_holds_the_folder_and_speaks(config, given, in_place_of_a_run, capsys, rank):
    given(BY_HAND | {"LOCAL_RANK": rank})
    run = config(devices=2)
    capsys.readouterr()
    train(run, {})
    assert in_place_of_a_run.locked == (rank == "0") and capsys.readouterr().err == ("a line\n" if rank == "0" else "")


def test_one_device_is_no_reason_to_ask_for_a_script(config, given, in_place_of_a_run, monkeypatch):
    given({"PL_TRAINER_DEVICES": "7"})
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())  # as in a notebook
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    train(config(), {}, notes=("note: one",))
    first, second = in_place_of_a_run.notes
    assert first == "note: one" and "PL_TRAINER_DEVICES" in second and in_place_of_a_run.locked


@pytest.mark.parametrize(("error", "kind", "told"), [
    (MemoryError(), UserError, "the machine's memory is full"),
    (torch.OutOfMemoryError("CUDA out of memory"), UserError, "the device's memory is full"),
    (ValueError("a mistake"), ValueError, "a mistake"), (UserError("a flag"), UserError, "a flag")])
def test_of_errors_only_full_memory_is_explained(config, given, in_place_of_a_run, error, kind, told):
    given({})
    in_place_of_a_run.error = error
    with pytest.raises(kind, match=f"^{told}") as caught:
        train(config(), {})
    assert (caught.value is error) == ("memory is full" not in told)


@pytest.fixture
def fits(monkeypatch) -> list[SimpleNamespace]:
    """What Lightning is given to train, which it does not do here; the process is none that would end a run."""
    fits = []

    def stand_in(config, environment, module, callbacks, batches, checkpoint, save) -> SimpleNamespace:
        fits.append(SimpleNamespace(environment=environment, module=module, callbacks=callbacks, batches=batches,
                                    checkpoint=checkpoint))
        return SimpleNamespace(is_global_zero=False)

    monkeypatch.setattr(run_file, "fit", stand_in)
    return fits


@pytest.mark.parametrize("resume", [False, True])
def test_another_process_writes_nothing_and_resumes_what_the_first_finds(config, given, fits, capsys, resume):
    given(BY_HAND)
    run = config(devices=2, epoch_count=1, resume=resume)
    folder = Path(run.run.proj_dir)
    capsys.readouterr()
    if resume:
        folder.mkdir()
        (folder / "last.ckpt").touch()
    train(run, {})
    assert fits[0].checkpoint == (folder / "last.ckpt" if resume else None) and capsys.readouterr().err == ""
    assert ([path.name for path in folder.iterdir()] if resume else folder.exists()) == (["last.ckpt"] if resume else False)


def test_before_the_first_step_it_is_said_what_trains(config, given, fits, capsys):
    given({})
    run = config(lora_r=4)
    capsys.readouterr()
    train(run, {}, notes=("note: of the command",))
    # LoRA of rank 4 on six matrices a block: four of 64 x 64, two of 64 x 256.
    trained = 2 * 4 * (4 * (64 + 64) + 2 * (64 + 256))
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: of the command",
                    f"x070 L2 D64, {trained:,} trained parameters, 12 pairs, 8 optimizer steps, fp32"]
    assert json.loads(Path(run.run.proj_dir, "config.json").read_text())["trained_parameters"] == trained
    assert type(fits[0].environment) is First and fits[0].batches.total_steps(2) == 8


def test_lightning_and_its_seed_say_nothing(config, given, fits, monkeypatch, caplog, capsys):
    given({})
    for name in ("pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    train(config(seed=5), {})
    drawn = torch.rand(3)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").info("a tip")
    assert not [record for record in caplog.records if "lightning" in record.name]
    assert "Seed" not in capsys.readouterr().err
    torch.manual_seed(99)  # what another process would start with
    train(config(seed=5, proj_dir=config().run.proj_dir + "2"), {})
    assert torch.equal(torch.rand(3), drawn)


def test_an_input_that_the_run_would_overwrite_is_not_read(config, given, fits):
    given({})
    run = config(load_model=f"{config().run.proj_dir}/rwkv-final.safetensors")
    Path(run.run.proj_dir).mkdir()
    Path(run.model.load_model).write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="--load_model: .* would be overwritten"):
        train(run, {})
    assert not fits


def test_an_adapter_to_continue_from(config, request):
    run = config(epoch_count=1, epoch_steps=1)
    train(run, {})
    fits = request.getfixturevalue("fits")  # from now on
    final = Path(run.run.proj_dir) / "rwkv-final.safetensors"
    train(config(load_adapter=str(final), seed=1, proj_dir=run.run.proj_dir + "-further"), {})
    written, held = load_checkpoint(final), adapter_tensors(fits[-1].module.model)
    assert written.keys() == held.keys() and all(tensor.equal(held[name]) for name, tensor in written.items())


def test_held_out_prompts_are_answered_where_there_are_some(config, prepared, given, fits, tmp_path):
    given({})
    pairs = torch.load(prepared("x070"), weights_only=True)
    torch.save([(pairs[0][0] + [65], *pairs[0][1:])], other := tmp_path / "other.save")
    for flags in ({}, {"eval_file": str(other)}):
        train(config(samples=1, proj_dir=str(tmp_path / f"run{len(flags)}"), **flags), {}, answer)
    asked = [one.questions.tokens for fit in fits for one in fit.callbacks if isinstance(one, Samples)]
    assert asked == [[list(pairs[0][0])], [[*pairs[0][0], 65]]]


def test_the_first_process_alone_ends_the_run(config, given, monkeypatch):
    given({})
    finished = []
    monkeypatch.setattr(run_file, "finish", finished.append)
    for first in (True, False):
        monkeypatch.setattr(run_file, "fit", lambda *_, first=first: SimpleNamespace(is_global_zero=first))
        train(config(proj_dir=f"{config().run.proj_dir}{first}"), {})
    assert finished == [Path(f"{config().run.proj_dir}True")]
