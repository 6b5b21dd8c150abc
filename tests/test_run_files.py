"""The growing files of a run: what is read, what is kept, what is said of them."""

import json
import os
import threading
from pathlib import Path

import pytest

from src.errors import UserError
from src.evaluation.picture import curve_svgs, draw_curves, read_columns, thinned
from src.run_files import append_line, check_lines, keep_lines, read_lines, report_gaps, sync_lines

DAMAGED = {
    "text": b'{"step": 1, "loss": "low"}', "null": b'{"step": 1, "loss": null}', "a list": b'{"step": 1, "loss": [[1]]}',
    "NaN": b'{"step": 1, "loss": NaN}', "infinity": b'{"step": 1, "loss": 1e999}',
    "400 digits": b'{"step": 1' + b"0" * 400 + b"}", "no step": b'{"loss": 1.0}',
    "a step of text": b'{"step": "1"}', "a step of half": b'{"step": 1.5}',
    "true": b'{"step": true}',
    "no object": b"[1]", "a number": b"5", "no JSON": b"hello", "nothing": b"", "bytes": b"\xff\xfe\x00", "cut": b'{"step": 1',
    "deep": b'{"step": 1, "loss": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "carriage return": b'{"step": 1}\r{"step": 2}',
}


def write(path: Path, *steps: int, **more: float) -> Path:
    path.write_text("".join(json.dumps({"step": step} | more) + "\n" for step in steps))
    return path


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "samples.jsonl"])
def test_a_damaged_line_is_named_and_stays(tmp_path, name, line):
    path = tmp_path / name
    good = {"step": 1, "samples": []} if name == "samples.jsonl" else {"step": 1, "loss": 2}
    path.write_bytes(json.dumps(good).encode() + b"\n" + line + b"\n" + json.dumps(good).encode() + b"\n")
    before = path.read_bytes()
    for reads in (read_lines, check_lines, lambda path: keep_lines(path, 0)):
        with pytest.raises(UserError, match=rf"{name}: line 2 is damaged \(.*\); remove that line") as caught:
            reads(path)
        assert len(str(caught.value)) < 400 + len(str(path)) and "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("sample", ['"x"', "{}", '{"prompt": 1, "chosen": "", "answer": "", "complete": true}',
                                    '{"prompt": "", "chosen": "", "answer": null, "complete": true}'])
def test_samples_are_of_their_own_shape(tmp_path, sample):
    (tmp_path / "samples.jsonl").write_text(f'{{"step": 0, "samples": [{sample}]}}\n')
    with pytest.raises(UserError, match=r"line 1 is damaged \(samples\[0\]"):
        read_lines(tmp_path / "samples.jsonl")


def test_lines_after_a_step_and_a_torn_one_are_dropped_and_the_rest_stays_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step":1,"loss" : 2.50}\n{"step": 2}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"ste')
    assert keep_lines(path, 2) == [1, 2] and path.read_bytes() == kept
    stamp = path.stat().st_mtime_ns
    assert keep_lines(path, 9) == [1, 2] and path.stat().st_mtime_ns == stamp
    assert keep_lines(path, -1) == [] and path.read_bytes() == b""
    assert keep_lines(tmp_path / "none", 1) == [] and not (tmp_path / "none").exists()


@pytest.mark.parametrize(("steps", "expected", "said"), [
    ([1, 2, 3], [1, 2, 3], None), ([], [], None), ([], [1], "lacks step 1"), ([1, 5], [1, 2, 3, 4, 5], "lacks steps 2-4"),
    ([2], [1, 2, 3], "lacks steps 1, 3"), ([1, 1, 2, 2, 3], [1, 2, 3], "has steps 1-2 more than once"),
    ([2, 1, 3], [1, 2, 3], "has steps out of order"),
    ([4, 1, 1], [0, 1, 4], "lacks step 0, has step 1 more than once, has steps out of order"),
    (range(0, 40, 2), range(40), "lacks steps 1, 3, 5, 7 and 16 more"), ([0, 4], [4], None),
])
def test_what_is_wrong_with_steps_is_said_in_one_line(capsys, steps, expected, said):
    report_gaps(Path("run/metrics.jsonl"), list(steps), expected)
    err = capsys.readouterr().err
    assert err.count("\n") == (said is not None)
    if said:
        assert err.startswith(f"warning: run/metrics.jsonl: {said}") and "the run continues" in err


@pytest.mark.usefixtures("drawn")
def test_curves_survive_gaps_repeats_and_columns_that_come_and_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "lr": 1.0}, {"step": 1, "lr": 1.0, "grad_norm": 2.0}, {"step": 7, "margin": 1e308},
            {"step": 3, "lr": -1e308, "margin": -1e308}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_columns(path)
    assert found["lr"][:2] == [1.0, 1.0] and str(found["lr"][2]) == "nan" and list(found) == ["step", "lr", "grad_norm", "margin"]
    assert len(curve_svgs(found, {})) == 3
    draw_curves(found, {}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert thinned([1e308, 3.0, float("nan"), 1.0] * 1000)[0] == 2.0


def test_no_lines_make_no_curves_and_no_error(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert read_columns(tmp_path / "metrics.jsonl") == {} and curve_svgs({}, {}) == []
    draw_curves({}, {}, tmp_path / "curves.png")


@pytest.mark.parametrize("call", [read_lines, check_lines, lambda path: keep_lines(path, 1), lambda path: append_line(path, {})])
def test_a_pipe_is_not_waited_for_and_a_device_is_not_written(tmp_path, call):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a pipe"), ("link", "a device"), ("folder", "a folder")):
        caught: list[Exception] = []

        def run(path: Path = tmp_path / name, caught: list = caught) -> None:
            try:
                call(path)
            except UserError as error:
                caught.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive() and kind in str(caught[0])


def test_what_was_appended_is_made_to_last(tmp_path, monkeypatch):
    write(tmp_path / "metrics.jsonl", 1)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_lines(tmp_path)
    assert synced == [str(tmp_path / "metrics.jsonl")]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"metrics.jsonl: .* \(No space left on device\); free the disk, .*--resume 1"):
        sync_lines(tmp_path)


def test_where_the_folder_is_gone_nothing_is_said_of_a_full_disk(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl: .* \(No such file or directory\); correct that, .*--resume 1"):
        append_line(tmp_path / "gone" / "metrics.jsonl", {"step": 1})
