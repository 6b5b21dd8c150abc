"""Files made to do harm, given to every script by every flag that takes such a file: exit code 2, one line, nothing written."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import sqlite3
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests import hostile
from tests.reliability.jobs import clear, names
from tests.reliability.warm import HANGS, SCRIPTS

# Bytes and seconds that it may take to refuse any of them. A regular expression in a tokenizer is tried on every text.
ROOM, LONGEST = 3 << 30, 60.0
FLAGS = {
    "rlhf_generate_reject_csv": {"--load_model": "model", "--input_csv": "table", "--tokenizer": "tokenizer"},
    "rlhf_dpo_generate_save": {"--load_model": "model", "--input_csv": "table", "--tokenizer": "tokenizer",
                               "--layer_profile": "profile"},
    "train": {"--load_model": "model", "--rlhf_train_file": "save", "--eval_file": "save", "--load_adapter": "safetensors",
              "--layer_profile": "profile"},
    "merge": {"--base": "model", "--adapter": "safetensors"},
    "evaluate": {"--load_model": "model", "--adapter": "safetensors", "--pairs": "save", "--reference_model": "safetensors"},
}
DEEP = 100_000


def tables() -> dict[str, bytes]:
    """By their names. None is a table of preferences."""
    archive, parquet = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("d.csv", "prompt,chosen,reject\na,b,c\n")
    pa.parquet.write_table(pa.table({"a": pa.array([b"\xff" * 100] * 10)}), parquet)
    database = sqlite3.connect(":memory:")
    database.execute("create table prompt (chosen)")
    zeros = bytes(4 << 20)
    return {
        "deep.json": b"[" * DEEP + b"]" * DEEP, "deep.jsonl": b'{"prompt":' * DEEP,
        "number.jsonl": b'{"prompt": ' + b"9" * 10**6 + b"}",
        "wide.jsonl": json.dumps(dict.fromkeys(map(str, range(10**5)))).encode(),
        "surrogate.jsonl": b'{"prompt": "\\ud800", "chosen": 1}',
        "zeros.csv.gz": gzip.compress(zeros, mtime=0), "zeros.csv.bz2": bz2.compress(zeros),
        "zeros.csv.xz": lzma.compress(zeros, preset=0), "cut.csv.gz": gzip.compress(b"prompt,chosen\na,b\n" * 50, mtime=0)[:40],
        "nul.csv": zeros[:1 << 20], "quote.csv": b'prompt,chosen,reject\n"' + b"a," * 10**6,
        "header.csv": b"a," * 10**5 + b"\n1\n", "escape.csv": b"\x1b]0;x\x07\x1b[2J,\x1b[31m\n1,2\n",
        "book.csv": archive.getvalue(), "base.csv": database.serialize(), "pickle.csv": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
        "binary.parquet": parquet.getvalue(), "tail.parquet": b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1",
        "head.arrow": b"ARROW1\0\0" + b"\xff" * 200, "stream.arrow": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(64),
    }


def profiles() -> dict[str, bytes]:
    head = b"Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay\n"
    row = b"0,lora,4,8,0,1e-3,1e-4,0\n"
    return {
        "nothing.csv": b"", "header.csv": head, "nan.csv": head + row.replace(b"8", b"nan"),
        "rank.csv": head + row.replace(b"4", b"9" * 400),
        "twice.csv": head + row * 2, "deep.csv": head + row.replace(b"0", b"9" * 5000, 1), "bytes.csv": b"\xff\xfe\0" * 100,
        "quote.csv": head + b'"' + row * 1000,
    }


def hostile_files() -> dict[str, dict[str, bytes]]:
    """By what they are given for, then by name."""
    torch_files = {f"{number}.pth": data for number, data in enumerate(hostile.torch_files().values())}
    safetensors = {f"{number}.safetensors": data for number, data in enumerate(hostile.safetensors_files().values())}
    # A text on which the library fails is not among the prompts of every one: those that can be read are used well.
    tokenizers = {f"{number}.json": text.encode() for number, (text, _) in enumerate(hostile.tokenizer_files().values())}
    return {"model": torch_files | safetensors, "save": torch_files, "safetensors": safetensors, "table": tables(),
            "tokenizer": tokenizers, "profile": profiles()}


def refused(run, job, flag, path, kind) -> list[str]:
    clear(job)
    if kind == "save":
        path = shutil.copy(path, path.with_suffix(".save"))
    # References of another model are asked for with texts only.
    more = {"pairs": str(job.out.parent / "inputs" / "pairs.csv"), "adapter": None} if flag == "--reference_model" else {}
    done = run(job.script, job.words(**{flag.removeprefix("--"): str(path)}, **more), room=ROOM, limit=LONGEST)
    one_line = done.err.startswith("error: ") and done.err.count("\n") == 1
    well = done.status == 2 and one_line and path.name in done.err and len(done.err) < 2000 and "\x1b" not in done.err
    if kind == "tokenizer":
        well = done.status in (0, 2) and "Traceback" not in done.err
    wrong = [] if well else ["hangs" if done.status == HANGS else f"status {done.status}, {done.err[-300:]!r}"]
    if done.status == 2 and kind != "tokenizer":  # one may fail on a text in the middle of the work
        wrong += [f"refused, and yet {name} was written" for name in sorted(names(job.out))]
    return [f"{job.script}.py {flag} {path.name}: {line}" for line in wrong]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "flag"), [(script, flag) for script in SCRIPTS for flag in FLAGS[script]])
def test_files_made_to_do_harm(run, jobs, tmp_path, script, flag):
    kind, wrong = FLAGS[script][flag], []
    for name, data in hostile_files()[kind].items():
        (tmp_path / name).write_bytes(data)
        wrong += refused(run, jobs[script], flag, tmp_path / name, kind)
    assert not wrong, "\n".join(wrong)


def test_a_few_files_made_to_do_harm(run, jobs, tmp_path):
    for script, flag, kind, name in (("merge", "--base", "model", "0.pth"), ("train", "--rlhf_train_file", "save", "1.pth"),
                                     ("evaluate", "--adapter", "safetensors", "2.safetensors"),
                                     ("rlhf_dpo_generate_save", "--input_csv", "table", "deep.json")):
        (tmp_path / name).write_bytes(hostile_files()[kind][name])
        assert not refused(run, jobs[script], flag, tmp_path / name, kind)
