"""The scripts as processes of their own: disks that are full, Ctrl-C, and nothing printed beside the one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.errors import UserError
from src.run_files import append_line
from tests.cli.conftest import SCRIPTS, check_told, snapshot, words_of
from tests.reliability.warm import warm

ROOT = Path(__file__).parents[2]
HUNG = 900.0  # seconds after which a process will not end any more, however busy the machine
OUTPUT = {"rlhf_generate_reject_csv": "--output_csv", "rlhf_dpo_generate_save": "--output_save", "train": "--proj_dir",
    "merge": "--output", "evaluate": "--output_json"}


def start(script: str, flags: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *words_of(flags)], stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def on_a_small_disk(tmp_path_factory):
    """`on_a_small_disk(script, flags, bytes)` -> exit code, stderr: so much of one file the system lets a script write."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    with warm(tmp_path_factory.mktemp("warm")) as run:
        yield lambda script, flags, size: run(script, words_of(flags), largest_file=size)[:2]


# The adapter is of 39 kB, last.ckpt of 120, config.json of 1.8, o.csv.json of 0.4 at first, a line of metrics.jsonl of 0.4. What
# is said goes into a file, too.
@pytest.mark.parametrize(("script", "largest_file", "name"), [
    ("rlhf_generate_reject_csv", 300, "o.csv.json"), ("rlhf_generate_reject_csv", 900, "o.csv"), ("rlhf_dpo_generate_save",
    2000, "o.save"),
    ("merge", 20_000, "o.pth"), pytest.param("evaluate", 500, "o.json", marks=pytest.mark.slow),
    pytest.param("train", 1000, "config.json", marks=pytest.mark.slow),
    pytest.param("train", 20_000, "rwkv-1.safetensors", marks=pytest.mark.slow), ("train", 60_000, "last.ckpt"),
])
def test_a_disk_that_fills_up(good, tmp_path, on_a_small_disk, script, largest_file, name):
    flags = good(script)
    if name == "o.csv":
        flags |= {"--max_tokens": "90"}
    code, err = on_a_small_disk(script, flags, largest_file)
    last = err.splitlines(keepends=True)[-1]
    check_told(code, last, (name, "cannot be written"))
    assert "Traceback" not in err and err.count("error: ") == 1
    left = {path for path in snapshot(tmp_path / "out") if not path.startswith("run/metrics")}
    assert not [path for path in left if path.endswith(".tmp")]
    assert not {path for path in left if path.endswith(name) and script != "rlhf_generate_reject_csv"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_metrics_line_that_finds_no_room_names_its_file():
    with pytest.raises(UserError, match="/dev/full: cannot be written"):
        append_line(Path("/dev/full"), {"step": 1})


@pytest.mark.parametrize("script", [pytest.param("rlhf_dpo_generate_save", marks=pytest.mark.slow), "merge"])
def test_what_was_complete_survives_a_full_disk(good, tmp_path, on_a_small_disk, script):
    flags = good(script)
    path = Path(flags[OUTPUT[script]])
    path.parent.mkdir()
    path.write_bytes(b"an earlier result")
    before = snapshot(tmp_path)
    check_told(*on_a_small_disk(script, flags, 2000), (path,))
    after = snapshot(tmp_path)
    # What preparing has computed stands beside it, and the same command goes on from there.
    assert (after.pop("out/o.save.partial", None) is not None) == (script == "rlhf_dpo_generate_save")
    assert after == before


@pytest.mark.parametrize("script", [pytest.param(script,
    marks=() if script == "train" else pytest.mark.slow) for script in SCRIPTS])
def test_one_line_and_nothing_else_for_a_pickle_with_code(good, tmp_path, script):
    flag = "--base" if script == "merge" else "--load_model"
    (tmp_path / "bomb.pth").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "trace").encode() + b"'\ntR.")
    process = start(script, good(script) | {flag: str(tmp_path / "bomb.pth")})
    err = process.communicate(timeout=HUNG)[1]
    check_told(process.returncode, err, ("bomb.pth", "holds code"))
    assert set(snapshot(tmp_path)) == {"bomb.pth"}


@pytest.mark.parametrize("script", ["rlhf_generate_reject_csv", pytest.param("rlhf_dpo_generate_save", marks=pytest.mark.slow),
                                    pytest.param("train", marks=pytest.mark.slow)])
def test_an_interruption_is_told_in_one_line(good, tmp_path, material, script):
    flags = good(script)
    flags |= {"rlhf_generate_reject_csv": {"--max_tokens": "100000", "--stop": ""},
              "rlhf_dpo_generate_save": {"--input_csv": str(tmp_path / "long.csv"), "--batch_tokens": "1"},
              "train": {"--epoch_steps": "1000000"}}[script]
    lines = [f"{'What? ' * 40}{n},yes {n},no {n}" for n in range(20_000)]
    (tmp_path / "long.csv").write_text("prompt,chosen,reject\n" + "\n".join(lines) + "\n")
    process = start(script, flags)
    begun = tmp_path / "out" / {"rlhf_generate_reject_csv": "o.csv", "rlhf_dpo_generate_save": "o.save.partial",
                                "train": "run/metrics.jsonl"}[script]
    end = time.monotonic() + HUNG
    while not begun.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("error: interrupted"), err
