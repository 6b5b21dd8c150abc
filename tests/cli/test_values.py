"""Odd and extreme values: each is understood, or refused in one line that names the flag; derived from the parsers."""

import importlib
import os
import shutil
import time
from pathlib import Path

import pytest

from src.errors import UserError
from src.training.batches import PairBatches
from src.values import Reader, path, wandb_project
from tests.cli.conftest import SCRIPTS, check_told, words_of
from tests.cli.test_every_flag import MODULES, NEEDED

GENERATE, PREPARE, TRAIN, MERGE, EVALUATE = SCRIPTS
# What Python's int() and float() take, or what no number is.
NO_NUMBER = ("", " ", "1_000", "１２", " 5", "5 ", "nan", "inf", "-inf", "0x10", "1e", "ten", "\udcff", "10" * 300)
WHOLE, NUMBER = ("a whole number",), ("a number", "0 or a number")
TOO_LARGE = ("9" * 31, "1" + "0" * 5000)


def parser(script):
    return importlib.import_module(f"src.cli.{MODULES[script]}").parser()


def actions(script, *words):
    """The flags whose readers say that they take such a thing."""
    return [action for action in parser(script)._actions
            if isinstance(action.type, Reader) and action.type.takes.startswith(words)]


def refused(script, flag, value) -> str:
    with pytest.raises(UserError) as caught:
        importlib.import_module(f"src.cli.{MODULES[script]}").parse([*words_of(NEEDED[script]), f"{flag}={value}"])
    message = " ".join(str(caught.value).split())
    assert flag in message and len(message) < 500
    return message


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != MERGE])
def test_numbers_are_ascii_and_within_bounds_that_are_told(script):
    numbers = actions(script, *WHOLE, *NUMBER, "auto, or a whole number")
    assert len(numbers) >= 3
    for action in numbers:
        flag, = action.option_strings
        for value in (*NO_NUMBER, *TOO_LARGE, "1e308", "-1e308", "1e400"):
            assert " from " in refused(script, flag, value)
    for action in actions(script, *WHOLE):
        flag, = action.option_strings
        for value in ("-2", "1e3", "1.0", "10000000000000", "10" * 15):
            refused(script, flag, value)
    for action in actions(script, *NUMBER):
        flag, = action.option_strings
        # Numbers that float32 takes for 0 are refused, but where any number may be taken off a logit.
        for value in () if flag in ("--presence", "--frequency") else ("1e-320", "-1e-320", "-5"):
            refused(script, flag, value)
        # What a float can't tell from 0 is none where 0 may stand, either.
        for value in ("1e-400", "-1e-400", "0.01e-9999"):
            refused(script, flag, value)


def test_minus_zero_is_zero_and_a_negative_number_in_any_form_is_a_value():
    train, generate = (importlib.import_module(f"src.cli.{MODULES[script]}") for script in (TRAIN, GENERATE))
    assert str(train.parse([*words_of(NEEDED[TRAIN]), "--lr_final", "-0"])[0].steps.lr_final) == "0.0"
    for value in ("-1e-3", "-.5", "-2"):
        made, _ = generate.parse([*words_of(NEEDED[GENERATE]), "--presence", value])
        assert made.sampling.presence == float(value)
    refused(GENERATE, "--presence", "-inf")


@pytest.mark.parametrize("script", SCRIPTS)
def test_paths_are_not_empty_nor_too_long_nor_what_a_shell_left(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = actions(script, "a path", "a file", "auto, or a file", "world, bytes")
    assert len(paths) >= 3
    for action in paths:
        flag, = action.option_strings
        for value in ("", "  "):
            assert "is empty" in refused(script, flag, value)
        assert "longer than the system allows" in refused(script, flag, "a" * 5000)
        assert "longer than the system allows" in refused(script, flag, "a/" * 5000)
        assert "the shell" in refused(script, flag, "~/x.json")
    for action in actions(script, "a file to write"):
        assert "ends like a folder" in refused(script, action.option_strings[0], "o/")
        assert "200 bytes" in refused(script, action.option_strings[0], "ü" * 101)
    (tmp_path / "~").mkdir()
    assert path("~/x") == "~/x" and path("./~x") == "./~x"


def test_no_path_flag_is_left_out():
    """Whatever takes a plain text takes it for a reason."""
    plain = {(script, action.option_strings[0]) for script in SCRIPTS for action in parser(script)._actions
             if isinstance(action.type, Reader) and action.type.read is str}
    assert plain == {(script, "--strategy") for script in (GENERATE, PREPARE, EVALUATE)} | {(TRAIN, "--quant_mode"),
                                                                                            (TRAIN, "--precision")}


@pytest.mark.parametrize(("given", "project"), [
    ("my project", "my project"), ("me/project", "me/project"), ("https://wandb.ai/me/project", "me/project"),
    ("https://wandb.ai/me/my%20project/runs/x?nw=1#s", "me/my project"), ("wandb.ai/me/project/", "me/project"),
    ("http://localhost:8080/me/project/workspace", "me/project"), ("", ""), (" a ", "a"),
])
def test_wandb_projects(given, project):
    assert wandb_project(given) == project


@pytest.mark.parametrize("value", ["a/b/c", "a:b", "a?b", "a#b", "50%", "a\\b", "/", "/a/", "me/", " ", "https://wandb.ai/me",
                                   "a\nb", "a\x1bb", "\udcff", "a" * 129, f"{'a' * 129}/b"])
def test_wandb_projects_that_wandb_refuses(fails, value):
    fails(TRAIN, {"--wandb": value}, "--wandb")


@pytest.mark.parametrize(("script", "flag"), [(GENERATE, "--stop"), (GENERATE, "--strategy"), (TRAIN, "--wandb"),
                                              (TRAIN, "--precision"), (TRAIN, "--quant_mode"), (TRAIN, "--peft"),
                                              (PREPARE, "--tokenizer")])
def test_texts_that_are_not_utf_8(fails, script, flag):
    fails(script, {flag: "a\udcff"}, flag)


def in_bytes(source: str | Path, folder: Path) -> str:
    """A copy whose name is not UTF-8."""
    copy = os.fsdecode(os.fsencode(folder) + b"/\xff\xfe" + os.fsencode(Path(source).name))
    shutil.copy(source, copy)
    return copy


@pytest.mark.parametrize("script", SCRIPTS)
def test_paths_that_are_not_utf_8_work(call, good, tmp_path, script):
    flags = {}
    for flag, value in good(script).items():
        if os.path.isfile(value):
            flags[flag] = in_bytes(value, tmp_path)
            if os.path.exists(f"{value}.json"):
                shutil.copy(f"{value}.json", f"{flags[flag]}.json")
        else:
            is_path = flag.startswith(("--output", "--proj_dir"))
            flags[flag] = os.fsdecode(os.fsencode(tmp_path) + b"/\xff" + os.fsencode(Path(value).name)) if is_path else value
    code, err = call(script, words_of(flags))
    assert code == 0 and "warning" not in err, err
    assert any(os.path.exists(value) for flag, value in flags.items() if flag.startswith(("--output", "--proj_dir")))
    if script == TRAIN:
        code, err = call(script, [*words_of(flags), "--resume", "1"])
        assert code == 0, err
        adapter = f"{flags['--proj_dir']}/rwkv-final.safetensors"
        code, err = call(MERGE, words_of({"--base": flags["--load_model"], "--adapter": adapter,
                                          "--output": str(tmp_path / "merged.safetensors")}))
        assert code == 0, err
        for flag in ("--tensorboard", "--wandb"):
            check_told(*call(script, [*words_of(flags), flag, "1"]), ("not UTF-8",))


@pytest.mark.parametrize("name", ["two\nlines", "[/y]", "-x", "e\x1b[31m", "{a}", "%s", "ü"])
def test_names_of_any_letters_work(call, good, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for script, flag, ending in ((MERGE, "--output", ".pth"), (EVALUATE, "--output_json", ".json"), (PREPARE, "--output_save",
                                                                                                     ".save")):
        flags = {given: value for given, value in good(script).items() if given != flag}
        code, err = call(script, [*words_of(flags), f"{flag}={name}{ending}"])
        assert code == 0 and (tmp_path / f"{name}{ending}").is_file(), err
        assert "\x1b" not in err


def test_a_folder_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").touch()
    fails(TRAIN, {"--proj_dir": tmp_path / "file"}, tmp_path / "file")


@pytest.mark.parametrize("words", [["word"], ["--"], ["@file"], ["-x"], ["--seed"], ["--see", "1"], ["-seed", "1"], ["\udcff"]])
@pytest.mark.parametrize("script", [GENERATE, TRAIN])
def test_words_that_are_no_flags(call, good, script, words):
    check_told(*call(script, [*words_of(good(script)), *words]))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("columns", ["1", "10", "20", "40"])
def test_help_in_a_narrow_window(capsys, monkeypatch, script, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--no_such", "-h"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "told"), [
    ('{"lora_r": NaN}', "NaN"), ('{"lora_r": 1e999}', "lora_r"), ("[" * 100000, "deep"), ("[1]", "--lora_r"), ("{", "not JSON"),
    ('{"lora_r": {"a": 1}}', "lora_r"), ('{"lora_r": "--seed"}', "--lora_r"), ('{"lora_r": true}', "lora_r"),
    ('{"lora_r": ' + "9" * 5000 + "}", "--lora_config"), ("\udcff", "--lora_config"),
])
def test_json_in_a_flag(fails, value, told):
    assert len(fails(TRAIN, {"--lora_config": value}, told)) < 500


PAIRS = [([number], [1] * (1 + number % 4), [2, 3], 0.0, 0.0) for number in range(100)]


@pytest.mark.parametrize(("epoch_steps", "micro_bsz", "batch_tokens", "accumulate", "epochs"), [
    (10**9, 4096, 0, 1, 10**6), (10**9, 1, 0, 10**5, 10**6), (10**6, 4096, 0, 10**5, 1), (10**9, 1, 20, 8, 10**6),
    (0, 1, 0, 10**5, 10**6),
])
def test_a_run_of_any_length_begins_at_once(epoch_steps, micro_bsz, batch_tokens, accumulate, epochs):
    started = time.process_time()
    batches = PairBatches(PAIRS, epoch_steps, micro_bsz, batch_tokens, accumulate, 0, 0, 1)
    in_epoch = epoch_steps or len(PAIRS)
    assert batches.total_steps(epochs) == epochs * -(-in_epoch // accumulate)
    epoch = batches.epoch(0, 0)
    assert len(epoch) == in_epoch
    if not batch_tokens:
        assert len(epoch[0].indices) == micro_bsz and epoch[0].share == 1 / (min(accumulate, in_epoch) * micro_bsz)
    assert time.process_time() - started < 5
