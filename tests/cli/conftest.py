"""Each script run as a user would, inside this process: `fails` is one bad input, told as every bad input must be."""

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src import progress
from src.cli.run import run

SCRIPTS = ("rlhf_generate_reject_csv", "rlhf_dpo_generate_save", "train", "merge", "evaluate")


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`call(script, flags)` -> (exit code, stderr), and stdout behind them with `with_out`."""
    monkeypatch.setattr(progress, "FIRST_LINE", 600.0)  # on a slow machine too, messages stand alone

    def call(script: str, flags: list[str], with_out: bool = False) -> tuple:
        main = importlib.import_module(script).main
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        capsys.readouterr()
        code = 0
        try:
            run(main)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return (code, err, out) if with_out else (code, err)

    return call


@pytest.fixture
def good(material, prepared, adapter, tmp_path) -> Callable[[str], dict[str, str]]:
    """`good(script)` -> flags that work, writing into tmp_path / "out"."""

    def good(script: str) -> dict[str, str]:
        model, csv, out = str(material / "x070.pth"), str(material / "pairs.csv"), tmp_path / "out"
        return {
            "rlhf_generate_reject_csv": {"--load_model": model, "--input_csv": csv, "--output_csv": str(out / "o.csv"),
                                         "--strategy": "cpu fp32", "--max_tokens": "3", "--overwrite": "1"},
            "rlhf_dpo_generate_save": {"--load_model": model, "--input_csv": csv, "--output_save": str(out / "o.save"),
                                       "--strategy": "cpu fp32", "--rlhf_max_corpus_len": "512"},
            "train": {"--load_model": model, "--rlhf_train_file": str(prepared("x070")), "--proj_dir": str(out / "run"),
                      "--accelerator": "cpu", "--precision": "fp32", "--epoch_steps": "2", "--ctx_len": "512", "--lora_r": "4"},
            "merge": {"--base": model, "--adapter": str(adapter), "--output": str(out / "o.pth")},
            "evaluate": {"--load_model": model, "--adapter": str(adapter), "--pairs": str(prepared("x070")),
                         "--output_json": str(out / "o.json"), "--strategy": "cpu fp32"},
        }[script]

    return good


@pytest.fixture(scope="session")
def adapter(material, prepared) -> Path:
    """An adapter on x070.pth, as train.py makes it."""
    from src.cli.train import parse
    from src.training.run import train

    folder = material / "adapter-run"
    flags = {"--load_model": material / "x070.pth", "--rlhf_train_file": prepared("x070"), "--proj_dir": folder,
             "--accelerator": "cpu", "--precision": "fp32",
             "--epoch_steps": "2", "--ctx_len": "512", "--lora_r": "4", "--lr_init": "1e-3"}
    config, expected, _ = parse([str(word) for pair in flags.items() for word in pair])
    train(config, expected)
    return folder / "rwkv-final.safetensors"


@pytest.fixture
def fails(call, good, tmp_path) -> Callable[..., str]:
    """`fails(script, {flag: value or None to leave it out}, *words)`: exit code 2, one line, and the disk as before."""

    def fails(script: str, changes: dict[str, object], *words: object) -> str:
        flags = good(script) | {flag: value if value is None else str(value) for flag, value in changes.items()}
        before = snapshot(tmp_path)
        code, err = call(script, words_of(flags))
        check_told(code, err, words)
        assert snapshot(tmp_path) == before
        return err

    return fails


def check_told(code: int, err: str, words: tuple[object, ...] = ()) -> None:
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err, f"{word!r} is not told: {err}"


def words_of(flags: dict[str, str | None]) -> list[str]:
    return [word for flag, value in flags.items() if value is not None for word in (flag, value)]


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder` with its content's digest."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))}
