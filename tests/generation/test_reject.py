"""The script as a user runs it: rows in order, kept ones untouched, interrupted runs that go on, one line for bad input."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlhf_generate_reject_csv as script
from src.checkpoint.io import save_checkpoint
from src.cli.run import run
from src.data import spill
from src.data.csv import Row
from src.generation import reject
from tests.classic import format_prompt
from tests.data.reading import read_pairs
from tests.pairs_csv import write_pairs_csv
from tests.random_checkpoint import make_dimensions, random_weights

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "self_instruct_prompts.csv"
ROWS = [Row("Hi", "Hello.", ""), Row("Two\r\nlines, \"quoted\"", "Yes,\n\nindeed.", ""), Row("Kept?", "Yes.", " as it\nstands "),
        Row("1 + 1", "2", "  "), Row("Why?", "é", "mine"), Row("Last", "one", "")]
KEPT = [2, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reject")
    dimensions = make_dimensions("x070", n_layer=2, n_embd=32, head_size=8, vocab_size=256)
    save_checkpoint(random_weights(dimensions, seed=5), folder / "tiny.pth")
    write_pairs_csv(folder / "in.csv", ROWS)
    return folder


@pytest.fixture
def generate(folder, tmp_path):
    """Run the script with short answers into a fresh out.csv, and give its path."""

    def generate(*flags: str) -> Path:
        out = tmp_path / "out.csv"
        script.main(["--load_model", str(folder / "tiny.pth"), "--input_csv", str(folder / "in.csv"), "--output_csv", str(out),
                     "--strategy", "cpu fp32", "--max_tokens", "9", "--batch_size", "2", *flags])
        return out

    return generate


def test_rows_are_in_order_and_kept_ones_untouched(generate, capsys):
    out = generate()
    rows = read_pairs(out, require_reject=True)
    assert [row[:2] for row in rows] == [row[:2] for row in ROWS]
    assert [rows[i].reject for i in KEPT] == [ROWS[i].reject for i in KEPT]
    made = [row.reject for i, row in enumerate(rows) if i not in KEPT]
    assert len(set(made)) == len(made) and all(reject == reject.strip() and "\n\n" not in reject for reject in made)
    with out.open(newline="", encoding="utf-8") as file:
        assert [tuple(fields) for fields in csv.reader(file)] == [("prompt", "chosen", "reject"), *rows]
    record = json.loads(Path(f"{out}.json").read_text())
    assert record["top_p"] == 0.3 and record["seed"] == 0 and record["tokenizer"] == "bytes"
    assert record["summary"]["rows_written"] == 6 and record["summary"]["rows_kept"] == 2
    assert sum(record["summary"]["stop_reasons"].values()) == 4 and 4 <= record["summary"]["tokens"] <= 36
    assert "complete; this run wrote 6 rows, 2 of them skipped, with the reject they had" in capsys.readouterr().err


def test_where_every_row_has_a_reject_nothing_is_drawn_and_a_line_says_so(generate, tmp_path, capsys):
    write_pairs_csv(tmp_path / "full.csv", [ROWS[i] for i in KEPT])
    out = generate("--input_csv", str(tmp_path / "full.csv"), "--top_p", "0.9")
    assert read_pairs(out, require_reject=True) == [ROWS[i] for i in KEPT]
    err = capsys.readouterr().err
    assert err.count("note: every row has a reject already, so nothing is drawn and no sampling flag has an effect") == 1
    generate("--input_csv", str(tmp_path / "full.csv"), "--output_csv", str(tmp_path / "new.csv"), "--overwrite", "1")
    assert "nothing is drawn" not in capsys.readouterr().err


def test_overwrite_makes_every_reject_anew(generate):
    rows = read_pairs(generate("--overwrite", "1"), require_reject=True)
    assert not {row.reject for row in rows} & {row.reject for row in ROWS}


def test_an_interrupted_run_goes_on_to_the_same_file(generate, capsys):
    out = generate()
    whole, sidecar = out.read_bytes(), json.loads(Path(f"{out}.json").read_text())
    del sidecar["summary"]
    ends = [end for end in range(len(whole)) if whole[:end].endswith(b'"\n')]
    for cut in {0, 5, 21, 22, ends[0] - 1, ends[0], ends[0] + 3, ends[2], ends[3] - 2, len(whole) - 1, len(whole)}:
        out.write_bytes(whole[:cut])
        Path(f"{out}.json").write_text(json.dumps(sidecar))
        generate()
        assert out.read_bytes() == whole
    capsys.readouterr()
    changed = out.stat().st_mtime_ns
    generate()
    assert out.stat().st_mtime_ns == changed
    assert "complete with all its 6 rows; nothing to do" in capsys.readouterr().err


def test_seed_and_batch_size(generate, folder, tmp_path):
    whole = generate().read_bytes()
    # In float32 another batch size may change a text where two outcomes lie within rounding; none here does.
    for flags, same in ((["--batch_size", "5"], True), (["--seed", "1"], False), (["--top_p", "0.9"], False)):
        (tmp_path / "out.csv").unlink()
        assert (generate(*flags).read_bytes() == whole) == same


def test_several_rejects_a_prompt_and_going_on_with_them(generate):
    flags = ("--num_rejects", "3", "--top_p", "0.9")
    out = generate(*flags)
    whole, sidecar = out.read_bytes(), json.loads(Path(f"{out}.json").read_text())
    rows = read_pairs(out, require_reject=True)
    numbers = [i for i in range(len(ROWS)) for _ in range(1 if i in KEPT else 3)]
    assert [row[:2] for row in rows] == [ROWS[i][:2] for i in numbers]
    assert len({row.reject for row in rows}) == len(rows)
    del sidecar["summary"]
    ends = [end for end in range(len(whole)) if whole[:end].endswith(b'"\n')]
    for cut in (ends[0], ends[1] + 5, ends[4], len(whole) - 1):
        out.write_bytes(whole[:cut])
        Path(f"{out}.json").write_text(json.dumps(sidecar))
        generate(*flags)
        assert out.read_bytes() == whole
    # The first reject of each prompt is the one that there would be alone.
    out.unlink()
    alone = read_pairs(generate("--top_p", "0.9"), require_reject=True)
    assert alone == [row for i, row in enumerate(rows) if i == 0 or numbers[i] != numbers[i - 1]]


def test_rows_in_files_give_the_same_bytes(generate, tmp_path, monkeypatch):
    """With several rejects, kept rows and equal prompts; also after an interruption, and where many rows are written at once."""
    rows = [Row(*texts) for texts in zip("aabbbacdaab", ["Yes."] * 11, ["", "", *"xyz", "", "", "u", "", *"vw"], strict=True)]
    write_pairs_csv(tmp_path / "in.csv", rows)
    flags = ("--input_csv", str(tmp_path / "in.csv"), "--num_rejects", "3", "--top_p", "0.9")
    whole = generate(*flags).read_bytes()
    numbers = [i for i, row in enumerate(rows) for _ in range(1 if row.reject else 3)]
    found = read_pairs(tmp_path / "out.csv", require_reject=True)
    assert [row._replace(reject=rows[i].reject or row.reject) for row, i in zip(found, numbers, strict=True)] == found
    assert [row[:2] for row in found] == [rows[i][:2] for i in numbers]
    sidecar = json.loads((tmp_path / "out.csv.json").read_text())
    del sidecar["summary"]
    for place, name, size in ((spill, "IN_MEMORY", 0), (spill, "BLOCK", 100), (reject, "AT_ONCE", 2)):
        monkeypatch.setattr(place, name, size)
    ends = [0, *(end for end in range(len(whole) + 1) if whole[:end].endswith(b'"\n'))]
    assert len(ends) == len(numbers) + 1
    for end in ends:
        (tmp_path / "out.csv").write_bytes(whole[:end])
        (tmp_path / "out.csv.json").write_text(json.dumps(sidecar))
        assert generate(*flags).read_bytes() == whole


def test_a_reject_equal_to_the_chosen_answer_is_drawn_again(generate, folder, tmp_path):
    out = generate("--top_p", "0.9")
    equal = [row._replace(chosen=row.reject, reject="") if i == 3 else row for i, row in enumerate(read_pairs(out, False))]
    write_pairs_csv(tmp_path / "equal.csv", [row if i in KEPT else row._replace(reject="") for i, row in enumerate(equal)])
    for avoid in ("0", "1"):
        out.unlink()
        flags = ("--top_p", "0.9", "--input_csv", str(tmp_path / "equal.csv"), "--avoid_equal", avoid)
        rows = read_pairs(generate(*flags), True)
        assert [row.reject == row.chosen for row in rows] == [i == 3 and avoid == "0" for i in range(len(rows))]


def test_prompts_over_the_context_are_told_and_answered(generate, tmp_path, capsys):
    assert len(read_pairs(generate("--ctx_len", "20"), require_reject=True)) == len(ROWS)
    told = capsys.readouterr().err
    assert "3 prompts are longer than --ctx_len 20, the longest with 37 tokens (the first is row 2)" in told
    write_pairs_csv(tmp_path / "in.csv", [ROWS[2], *ROWS[:2]])
    generate("--ctx_len", "20", "--input_csv", str(tmp_path / "in.csv"), "--output_csv", str(tmp_path / "other.csv"))
    told = capsys.readouterr().err
    assert "1 prompts are longer than --ctx_len 20, the longest with 37 tokens (the first is row 3)" in told


@pytest.mark.parametrize(("flags", "message"), [
    (["--temperature", "0", "--num_rejects", "2"], "--temperature 0 answers a prompt one way only"),
    (["--batch_size", "some"], "argument --batch_size"), (["--num_rejects", "0"], "argument --num_rejects"),
    (["--input_csv", "nowhere.csv"], "nowhere.csv does not exist"),
    (["--load_model", "nowhere.pth"], "nowhere.pth does not exist"),
    (["--input_csv", "INPUT", "--output_csv", "INPUT"], "is also the file of --input_csv"),
    (["--tokenizer", "world"], "--tokenizer world: has 65536 ids"),
    (["--strategy", "cpu fp33"], "--strategy 'cpu fp33' is not understood"),
    (["--top_p", "0"], "argument --top_p: takes a number from"), (["--top_p", "nan"], "argument --top_p: takes a number from"),
    (["--top_p", "1.1"], "--top_p"),
    (["--temperature", "-1"], "argument --temperature: takes"), (["--temperature", "inf"], "argument --temperature: takes"),
    (["--penalty_decay", "1.5"], "argument --penalty_decay: takes"), (["--frequency", "nan"], "argument --frequency: takes"),
    (["--presence", "x"], "argument --presence: takes a number"), (["--max_tokens", "0"], "argument --max_tokens"),
    (["--batch_size", "0"], "argument --batch_size"), (["--seed", "-1"], "argument --seed"),
    (["--top_k", "-1"], "argument --top_k"),
    (["--overwrite", "yes"], "argument --overwrite: takes 0 or 1"), (["--ban_end_of_text", "2"], "argument --ban_end_of_text"),
    (["--temp", "1"], "unrecognized arguments: --temp"),
])
def test_bad_flags_are_told_in_one_line(flags, message, folder, tmp_path, monkeypatch, capsys):
    source = str(folder / "in.csv")
    given = {"--load_model": str(folder / "tiny.pth"), "--input_csv": source, "--output_csv": str(tmp_path / "out.csv")}
    given |= zip(flags[::2], [source if value == "INPUT" else value for value in flags[1::2]], strict=True)
    monkeypatch.setattr(sys, "argv", ["script", *(word for pair in given.items() for word in pair)])
    before = (folder / "in.csv").read_bytes()
    with pytest.raises(SystemExit) as ended:
        run(script.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir()) and (folder / "in.csv").read_bytes() == before


def test_the_script_in_a_process_of_its_own(folder, tmp_path, monkeypatch, capsys):
    """Killed in the middle, run again, and refused with exit code 2 for another setting: the real thing."""
    many = [Row(f"Hi {number}", "Hello.", "") for number in range(5000)]  # minutes, so that it is killed before the last
    write_pairs_csv(tmp_path / "in.csv", many)
    command = [sys.executable, str(ROOT / "rlhf_generate_reject_csv.py"), "--load_model", str(folder / "tiny.pth"), "--input_csv",
               str(tmp_path / "in.csv"), "--output_csv", str(tmp_path / "out.csv"), "--strategy", "cpu fp32", "--batch_size", "1"]
    long = subprocess.Popen([*command, "--max_tokens", "300"], stderr=subprocess.PIPE, cwd=tmp_path)
    while not (tmp_path / "out.csv").exists() or (tmp_path / "out.csv").read_bytes().count(b'"\n') < 1:
        assert long.poll() is None, long.stderr.read()
        time.sleep(0.02)
    long.kill()
    long.wait()
    left = (tmp_path / "out.csv").read_bytes()
    rows = read_pairs(tmp_path / "out.csv", require_reject=True)
    assert 1 <= len(rows) < len(many) and left.endswith(b'"\n')

    monkeypatch.setattr(sys, "argv", [*command[1:], "--max_tokens", "9"])
    with pytest.raises(SystemExit) as ended:
        run(script.main)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "started with max_tokens 300 (now 9)" in err
    assert (tmp_path / "out.csv").read_bytes() == left


def test_conversations_from_jsonl_come_out_as_a_csv_that_reads_back_the_same(folder, tmp_path):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi\n\nthere"},
            {"role": "assistant", "content": "ho"}, {"role": "user", "content": "why?"}]
    records = [{"prompt": said, "chosen": [{"role": "assistant", "content": "so."}]},
               {"prompt": said[1:], "chosen": 'so, "ok".'}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    script.main(["--load_model", str(folder / "tiny.pth"), "--input_csv", str(tmp_path / "in.jsonl"), "--max_tokens", "5",
                 "--output_csv", str(tmp_path / "out.csv"), "--strategy", "cpu fp32"])
    rows = read_pairs(tmp_path / "out.csv", require_reject=True)
    asked = "User: hi\nthere\n\nAssistant: ho\n\nUser: why?\n\nAssistant:"
    assert [format_prompt(1, row.prompt) for row in rows] == [f"System: Be brief.\n\n{asked}", asked]
    assert [row.chosen for row in rows] == ["so.", 'so, "ok".']


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_real_prompts(folder, tmp_path):
    rows = read_pairs(SHARED, require_reject=False)[:30]
    write_pairs_csv(tmp_path / "in.csv", rows)
    script.main(["--load_model", str(folder / "tiny.pth"), "--input_csv", str(tmp_path / "in.csv"), "--max_tokens", "5",
                 "--output_csv", str(tmp_path / "out.csv"), "--strategy", "cpu fp32"])
    assert [row[:2] for row in read_pairs(tmp_path / "out.csv", require_reject=True)] == [row[:2] for row in rows]
