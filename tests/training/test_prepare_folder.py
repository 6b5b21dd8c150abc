"""What stands in a run's folder once its next step can begin: config.json, lines up to the checkpoint, and nothing lost."""

import json
from pathlib import Path

import pytest

from src.errors import UserError
from src.settings import flat
from src.training.config import TrainConfig
from src.training.folder import check_inputs, prepare_folder, resume_file
from tests.settings import changed
from tests.training.outside import lines


@pytest.fixture
def run(config, tmp_path):
    """A run that resumes, under DeepSpeed, whose checkpoints a few bytes can stand for."""
    (tmp_path / "läuft").mkdir()
    return config(rlhf_train_file=str(tmp_path / "pairs.save"), proj_dir=str(tmp_path / "läuft"), resume=True,
                  strategy="deepspeed_stage_2")


@pytest.fixture
def folder(run):
    return Path(run.run.proj_dir)


def prepare(run: TrainConfig, facts: dict | None = None) -> Path | None:
    return prepare_folder(Path(run.run.proj_dir), run, facts or {}, {"total_steps": 7}, {})


def checkpoint(path: Path, step: int, **lines: list[int]) -> None:
    path.mkdir()
    record = {"step": step, "lines": {f"{name}.jsonl": steps for name, steps in lines.items()}}
    (path / "manifest.json").write_text(json.dumps({"record": record, "files": {}}))


def write_lines(path: Path, *steps: int) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps))


def steps_in(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def test_a_new_runs_settings_and_facts_are_in_config_json_for_people_too(run, folder):
    assert prepare(changed(run, resume=False), {"base_fingerprint": "aa"}) is None
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == flat(changed(run, resume=False)) | {"base_fingerprint": "aa", "total_steps": 7}
    assert text.startswith('{\n  "')


def test_a_resumed_run_is_cut_back_to_its_checkpoint(run, folder, capsys):
    prepare(changed(run, resume=False))
    before = (folder / "config.json").read_bytes()
    checkpoint(folder / "last.ckpt", 3, eval=[0, 2])
    write_lines(folder / "metrics.jsonl", 1, 2, 3, 4)
    write_lines(folder / "eval.jsonl", 0, 2, 4)
    assert prepare(run) == folder / "last.ckpt"
    assert steps_in(folder / "metrics.jsonl") == [1, 2, 3] and steps_in(folder / "eval.jsonl") == [0, 2]
    assert (folder / "config.json").read_bytes() == before and capsys.readouterr().err == ""
    write_lines(folder / "metrics.jsonl", 1, 2)
    write_lines(folder / "eval.jsonl", 0)
    prepare(run)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {folder / name}: lacks step {step}; the run continues, and its report and curves show the lines that are there"
        for name, step in (("metrics.jsonl", 3), ("eval.jsonl", 2))]


def test_no_line_is_cut_where_a_later_file_is_damaged(run, folder):
    prepare(changed(run, resume=False))
    checkpoint(folder / "last.ckpt", 1)
    write_lines(folder / "metrics.jsonl", 1, 2)
    (folder / "eval.jsonl").write_text("?\n")
    with pytest.raises(UserError, match="eval.jsonl: line 1 is damaged"):
        prepare(run)
    assert steps_in(folder / "metrics.jsonl") == [1, 2]


def test_a_run_broken_off_before_its_first_checkpoint_begins_anew(run, folder, capsys):
    """Its first adapter may be there, since an epoch's adapter is written before its checkpoint; its lines go."""
    prepare(changed(run, resume=False))
    write_lines(folder / "metrics.jsonl", 1, 2)
    write_lines(folder / "eval.jsonl", 0, 1)
    (folder / "rwkv-1.safetensors").touch()
    assert prepare(run) is None
    assert [path.read_bytes() for path in (folder / "metrics.jsonl", folder / "eval.jsonl")] == [b"", b""]
    assert capsys.readouterr().err.startswith(f"note: no effect: --resume 1 ({folder} has no last.ckpt to resume from")
    for later in ("rwkv-final.safetensors", "rwkv-2.safetensors"):
        (folder / later).touch()
        with pytest.raises(UserError, match=f"last.ckpt is missing, so --resume 1 can't continue after rwkv-[2f].*{later[-5:]}"):
            prepare(run)
        (folder / later).unlink()


def test_without_resume_nothing_is_said_of_it(run, folder, capsys):
    prepare(changed(run, resume=False))
    assert capsys.readouterr().err == ""
    write_lines(folder / "eval.jsonl", 0)
    prepare(changed(run, resume=False))  # no step was taken, so that nothing of worth is lost
    assert capsys.readouterr().err == "" and steps_in(folder / "eval.jsonl") == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("there, named", [
    ({"config.json": '{"proj_dir": "x"}', "eval.jsonl": ""}, None), ({"notes.txt": "mine"}, None),
    ({"config.json": '{"hidden_size": 512}'}, "config.json"),
    ({"config.json": '{"hidden_size": 512}', "curves.png": ""}, "config.json"), ({"curves.png": ""}, "curves.png"),
    ({"report.html": "", "eval.jsonl": ""}, "eval.jsonl"), ({"rwkv-1.state.pth": ""}, "rwkv-1.state.pth"),
])
def test_files_that_are_no_runs_stay(run, folder, there, named, resume):
    for name, text in there.items():
        (folder / name).write_text(text)
    if named:
        with pytest.raises(UserError, match=f"{named}: belongs to no run and would be overwritten"):
            prepare(changed(run, resume=resume))
    else:
        prepare(changed(run, resume=resume))
    assert {name: (folder / name).read_text() for name in there if name != "config.json" or named} == \
        {name: text for name, text in there.items() if name != "config.json" or named}


def test_settings_that_are_gone_can_not_be_compared(run, folder):
    checkpoint(folder / "last.ckpt", 1)
    with pytest.raises(UserError, match=r"config.json is missing or damaged \(No such file or directory\)"):
        prepare(run)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is missing or damaged \((?!None)"):
        prepare(run)


def test_leftovers_of_killed_processes_are_removed_and_others_stay(run, folder):
    ours, others = (".metrics.jsonl.0123abcd.tmp", ".rwkv-12.safetensors.0123abcd.tmp"), (".notes.0123abcd.tmp", "metrics.tmp")
    for name in (*ours, *others):
        (folder / name).touch()
    prepare(changed(run, resume=False))
    assert sorted(path.name for path in folder.iterdir()) == sorted((*others, "config.json"))


def test_a_checkpoint_that_was_about_to_take_its_name_is_resumed_by_every_process(run, folder):
    prepare(changed(run, resume=False))
    assert resume_file(run) is None
    checkpoint(folder / ".last.ckpt.tmp", 1)
    write_lines(folder / "metrics.jsonl", 1)
    assert resume_file(run) == folder / "last.ckpt" and resume_file(changed(run, resume=False)) is None
    assert prepare(run) == folder / "last.ckpt" and (folder / "last.ckpt" / "manifest.json").exists()
    assert resume_file(run) == folder / "last.ckpt" and resume_file(changed(run, resume=False)) is None


@pytest.mark.parametrize("name, refused", [
    ("run/report.html", True), ("run/rwkv-3.safetensors", True), ("run/pairs.save", False), ("report.html", False),
    ("run/link/report.html", False),
])
def test_no_input_is_overwritten(run, folder, name, refused):
    path = folder.parent / name.replace("run", folder.name)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    link = folder / "config.json"
    for given in (path, link):
        if given is link:
            link.symlink_to(path)
        if refused or given is link:
            with pytest.raises(UserError, match="--rlhf_train_file: .* would be overwritten"):
                check_inputs(folder, changed(run, rlhf_train_file=str(given)))
        else:
            check_inputs(folder, changed(run, rlhf_train_file=str(given)))
