"""Every reader of a file that may come from anybody, with valid files that the project itself makes, and what it must give."""

import gzip
import importlib
import io
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch
from matplotlib.figure import Figure

from src.adapters.apply import apply_layer_profile
from src.adapters.files import load_adapter, merge_adapter, read_adapter
from src.adapters.layer_profile import LayerSetting, read_layer_profile
from src.checkpoint.base import load_base
from src.checkpoint.io import load_checkpoint, not_finite, save_checkpoint
from src.data.examples import read_texts
from src.data.faults import usable
from src.data.ranking import PairRule
from src.data.read import read_pairs
from src.errors import UserError
from src.evaluation.samples import read_questions
from src.model import build_model
from src.preference.pairs import has_references, load_pairs
from src.tokenizer import load_tokenizer
from src.tokenizer.byte import ByteTokenizer
from tests.data.test_binidx import index
from tests.reliability.fuzz import Reader
from tests.reliability.jobs import Job, artifacts, make_inputs, make_jobs
from tests.reliability.mutate import blind, gzipped, json_value, safetensors_header, zip_entry
from tests.reliability.warm import draw_nothing
from tests.tokenizer.files import KINDS

N_LAYER, VOCABULARY, LONGEST = 2, 256, 512
RATES = (1e-3, 1e-4)
PROFILE = ("Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts\n"
           "emb,freeze,0,0,0,0,0,0,0,0,\n0,lora,4,8,0.1,1e-3,1e-4,0.01,1e-3,1e-4,\"att.key,ffn\"\n"
           "1,bone,4,8,0,1e-3,1e-4,0.01,0,0,\nhead,full,0,0,0,1e-3,1e-4,0,0,0,\n")
ROWS = [{"prompt": f"What is {n} + {n}?", "chosen": f"It is {2 * n}.", "rejected": "No idea" + "!" * n} for n in range(6)]
TALKS = [{"messages": [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": "Hi."}],
          "chosen": [{"role": "assistant", "content": "Good."}],
          "rejected": [{"role": "assistant", "content": "Bad.", "weight": 0}]} for n in range(4)]
LISTS = [{"instruction": f"What is {n}?", "completions": [{"response": f"It is {2 * n}.", "overall_score": 8.5, "annotations": {
    "honesty": {"Rating": "5"}}}, {"response": "No idea.", "overall_score": 2, "annotations": {"honesty": {"Rating": "N/A"}}}]}
    for n in range(4)]
RANKED = [{"prompt": "why?", "responses": ["so", "no", [{"role": "assistant", "content": "hm"}]], "ranks": [1, "3", 2]}] * 3
THUMBS = [{"prompt": f"What is {n}?", "completion": f"It is {2 * n}.", "label": n % 2 == 0} for n in range(4)]
MANY = [{"system": "Be brief.", "history": [["a", "b"]], "question": "why?", "chosen": "so", "rejected": "no", "label": True}]
NAMES = ("csv", "tsv", "jsonl", "lists", "thumbs", "binidx", "texts", "compressed", "parquet", "arrow", "pth", "safetensors",
         "adapter", "save", "save sidecar", "layer profile", "tokenizer.json", "journal", "csv sidecar")
# Files of a run's folder, whose reader is a whole run of train.py.
RUN_NAMES = ("config.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl", "last.ckpt")


def make_readers(folder: Path) -> dict[str, Reader]:
    """All readers by name; the files that they need are made in `folder` where they are not there yet."""
    inputs = folder / "inputs"
    if not inputs.exists():
        _make_files(folder, inputs)
    return {**_tables(), **_checkpoints(inputs), **_pairs(inputs), **_others(inputs), **_going_on(folder, inputs)}


def _make_files(folder: Path, inputs: Path) -> None:
    """What the scripts make of base.pth and pairs.csv, and where they would go on."""
    inputs.mkdir(parents=True)
    jobs = make_jobs(make_inputs(inputs), folder / "out")
    drawn, Figure.savefig = Figure.savefig, draw_nothing
    for script, made in (("rlhf_dpo_generate_save", ("o.save", "o.save.json")), ("train", ("run/rwkv-final.safetensors",)),
                         ("rlhf_generate_reject_csv", ("o.csv", "o.csv.json"))):
        _main(jobs[script])
        for name in made:
            shutil.copy(folder / "out" / name, inputs / Path(name).name.replace("o.save", "pairs.save").replace(
                "rwkv-final", "adapter"))
    Figure.savefig = drawn
    shutil.copytree(folder / "out" / "run", inputs / "run")
    (inputs / "o.save.partial").write_bytes(_journal(jobs["rlhf_dpo_generate_save"], folder))
    shutil.rmtree(folder / "out")


def _main(job: Job, again: bool = False) -> None:
    importlib.import_module(job.script).main(job.words_again() if again else job.words())


def _journal(job: Job, folder: Path) -> bytes:
    """The .partial that a run leaves when it is broken off before its output is written."""
    from src.preference import prepare

    kept, found = prepare.save_pairs, []

    def break_off(path: str, *_: Any) -> None:
        found.append(Path(f"{path}.partial").read_bytes())
        raise KeyboardInterrupt

    prepare.save_pairs = break_off
    try:
        _main(job)
    except KeyboardInterrupt:
        return found[0]
    finally:
        prepare.save_pairs = kept
    raise AssertionError("the run was not broken off")


def _tables() -> dict[str, Reader]:
    csv = b"prompt,chosen,reject\n" + b"".join(f'"{r["prompt"]}","{r["chosen"]}",{r["rejected"]}\n'.encode() for r in ROWS)
    quoted = 'prompt;chosen;reject\r\n"a ""b""\r\n c";"d";"é"\r\n'.encode("utf-16")
    parts = csv.replace(b'","', b'"\t"').replace(b'",', b'"\t').replace(b",", b"\t", 2)
    lines = b"\n".join(json.dumps(row).encode() for row in ROWS) + b"\n"
    talks = b"\n".join(json.dumps(row).encode() for row in TALKS) + b"\n"
    documents = [lines, talks, *(json.dumps(rows).encode() for rows in (ROWS, {"data": MANY}, MANY))]
    parquet, arrow = [], []
    for rows in (ROWS, TALKS, MANY):
        table, file, stream, whole = pa.Table.from_pylist(rows), io.BytesIO(), io.BytesIO(), io.BytesIO()
        pa.parquet.write_table(table, file)
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
        with pa.ipc.new_file(whole, table.schema) as writer:
            writer.write_table(table)
        parquet.append(file.getvalue())
        arrow += [stream.getvalue(), whole.getvalue()]
    return {
        "csv": Reader("d.csv", [csv, quoted, "\ufeff".encode() + csv], _read_table, (blind,)),
        "tsv": Reader("d.tsv", [parts], _read_table, (blind,)),
        "jsonl": Reader("d.jsonl", documents, _read_table, (json_value, json_value, blind)),
        "lists": Reader("d.jsonl", [_lines(LISTS), _lines(RANKED)], _read_preferences, (json_value, json_value, blind)),
        "thumbs": Reader("d.jsonl", [_lines(THUMBS)], _read_preferences, (json_value, json_value, blind)),
        "binidx": Reader("d.idx", [index([3, 4], [0, 1, 2]), index([7], [0, 1])], _read_corpus, (blind,)),
        "texts": Reader("t.jsonl", [talks, lines, b'{"text": "a document"}\n{"text": "b"}\n'], _read_texts, (json_value, blind)),
        "compressed": Reader("d.csv.gz", [gzip.compress(csv, mtime=0)], _read_table, (gzipped,)),
        "parquet": Reader("d.parquet", parquet, _read_table, (blind,)),
        "arrow": Reader("d.arrow", arrow, _read_table, (blind,)),
    }


def _read_table(path: Path) -> None:
    rows = usable(read_pairs(path, require_reject=False), skip_bad_rows=True)
    assert rows
    for row in rows:
        for text in row[:3]:
            assert isinstance(text, str), f"{type(text)} for a text"
            text.encode()
        assert row.prompt.strip() and row.chosen.strip(), "an empty text"


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows) + b"\n"


def _read_preferences(path: Path) -> None:
    rows = usable(read_pairs(path, require_reject=True, rule=PairRule("all", 0.5)), skip_bad_rows=True)
    assert rows
    for row in rows:
        for text in row:
            assert isinstance(text, str), f"{type(text)} for a text"
            text.encode()
        assert row.prompt.strip() and (row.chosen.strip() or row.reject.strip()), "an empty text"


def _read_corpus(path: Path) -> None:
    tokens = path.with_suffix(".bin")
    tokens.write_bytes(struct.pack("<7H", 65, 66, 0, 67, 68, 69, 0))
    try:
        _read_texts(path)
    finally:
        tokens.unlink()


def _read_texts(path: Path) -> None:
    texts, _ = read_texts(path, ByteTokenizer(), LONGEST, 0, on_prompt=False, skip_bad_rows=True)
    assert texts
    for text in texts:
        assert len(text.tokens) == len(text.trained) and all(0 <= token < VOCABULARY for token in text.tokens)


def _checkpoints(inputs: Path) -> dict[str, Reader]:
    weights = load_checkpoint(inputs / "base.pth")
    save_checkpoint(weights, inputs / "base.safetensors")
    files = {name: (inputs / name).read_bytes() for name in ("base.pth", "base.safetensors", "adapter.safetensors")}
    return {
        "pth": Reader("m.pth", [files["base.pth"]], _read_base, (zip_entry, zip_entry, blind)),
        "safetensors": Reader("m.safetensors", [files["base.safetensors"]], _read_base, (safetensors_header, blind)),
        "adapter": Reader("a.safetensors", [files["adapter.safetensors"]], _adapter_reader(inputs / "base.pth"),
                          (safetensors_header, safetensors_header, blind)),
    }


@torch.no_grad()
def _read_base(path: Path) -> None:
    weights, dimensions = load_base(path)
    assert all(isinstance(name, str) and tensor.layout == torch.strided for name, tensor in weights.items())
    model = build_model(weights, dimensions, torch.float32, "cpu", None)
    logits = model.logits(model(torch.tensor([1, 2, 3]), torch.tensor([0, 3], dtype=torch.int32))[0])
    assert logits.shape == (3, dimensions.vocab_size)


def _adapter_reader(base: Path) -> Callable[[Path], None]:
    weights, dimensions = load_base(base)

    def read(path: Path) -> None:
        adapter = read_adapter(path)
        _check_settings(adapter.settings)
        merged = merge_adapter(weights, path)
        assert merged.keys() == weights.keys() and not not_finite(merged)
        model = build_model(weights, dimensions, torch.float32, "cpu", None)
        apply_layer_profile(model, adapter.settings, 0)
        load_adapter(model, path)

    return read


def _check_settings(settings: list[LayerSetting]) -> None:
    for setting in settings:
        for name, value in vars(setting).items():
            kind = {"layer": str, "mode": str, "rank": int, "reject_parts": tuple, "full_parts": tuple}.get(name, (int, float))
            assert isinstance(value, kind) and not isinstance(value, bool), f"{name} is {value!r}"
            assert not isinstance(value, float) or math.isfinite(value), f"{name} is {value}"


def _pairs(inputs: Path) -> dict[str, Reader]:
    save, sidecar = ((inputs / name).read_bytes() for name in ("pairs.save", "pairs.save.json"))
    tensors = io.BytesIO()
    torch.save([(torch.tensor([1, 2]), (3,), torch.tensor([4]), torch.tensor(-1.5), -2.0)], tensors)

    def read(path: Path) -> None:
        pairs, told, _ = load_pairs(path.with_name("p.save"), VOCABULARY, LONGEST)
        for prompt, chosen_tokens, reject_tokens, chosen, reject, *_ in pairs:
            parts = prompt, chosen_tokens, reject_tokens
            assert all(type(token) is int and 0 <= token < VOCABULARY for part in parts for token in part)
            assert type(chosen) is type(reject) is float and math.isfinite(chosen) and math.isfinite(reject)
        has_references(pairs, told)
        read_questions(pairs, 2, told, VOCABULARY)

    return {
        "save": Reader("p.save", [save, tensors.getvalue()], read, (zip_entry, zip_entry, blind)),
        "save sidecar": Reader("p.save.json", [sidecar], read, (json_value, blind), {"p.save": save}),
    }


def _others(inputs: Path) -> dict[str, Reader]:
    weights, dimensions = load_base(inputs / "base.pth")

    def read_profile(path: Path) -> None:
        settings = read_layer_profile(path, N_LAYER, RATES)
        _check_settings(settings)
        try:
            apply_layer_profile(build_model(weights, dimensions, torch.float32, "cpu", None), settings, 0)
        except UserError as error:  # of the one profile that a run has; the model knows no file
            assert str(error).startswith(("layer profile, layer ", "layer profile: ")), error
            raise UserError(f"{path}: {error}") from None

    def read_tokenizer(path: Path) -> None:
        tokenizer = load_tokenizer(str(path), 2048)
        for text in ("the cat é \U0001f600 sat\n\n", ""):
            tokens = tokenizer.encode(text, continues=True)
            assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in tokens)
            assert isinstance(tokenizer.decode(tokens), str) and isinstance(tokenizer.decode_bytes(tokens), bytes)

    return {
        "layer profile": Reader("l.csv", [PROFILE.encode()], read_profile, (blind,)),
        "tokenizer.json": Reader("t.json", [kind().to_str().encode() for kind in KINDS.values()], read_tokenizer,
                                 (json_value, json_value, blind)),
    }


def _going_on(folder: Path, inputs: Path) -> dict[str, Reader]:
    """Files that a run goes on from: it must refuse them, or end with something whole."""
    out = folder / "input"
    jobs = make_jobs(inputs, out)
    read = {name: (inputs / name).read_bytes() for name in ("o.csv", "o.csv.json")}
    pairs = load_pairs(inputs / "pairs.save", VOCABULARY, LONGEST)[0]

    def prepare(_: Path) -> None:
        _main(jobs["rlhf_dpo_generate_save"])
        assert load_pairs(out / "o.save", VOCABULARY, LONGEST)[0] == pairs, "other pairs"

    def generate(_: Path) -> None:
        _main(jobs["rlhf_generate_reject_csv"])
        assert (out / "o.csv").read_bytes() == read["o.csv"], "o.csv is not what an unbroken run makes"

    def resume(_: Path) -> None:
        Figure.savefig = draw_nothing  # in this forked process
        _main(jobs["train"], again=True)
        assert read_adapter(out / "run" / "rwkv-final.safetensors")
        json.loads((out / "run" / "config.json").read_bytes())

    half = read["o.csv"][:len(read["o.csv"]) // 2]
    run = {f"run/{name}": (inputs / "run" / name).read_bytes() for name in sorted(artifacts(inputs / "run"))}
    readers = {
        "journal": Reader("o.save.partial", [(inputs / "o.save.partial").read_bytes()], prepare, (json_value, blind),
                          grows=True),
        "csv sidecar": Reader("o.csv.json", [read["o.csv.json"]], generate, (json_value, blind), {"o.csv": half}),
    }
    for name in RUN_NAMES:
        target = f"run/{name}"
        mutations = (zip_entry, zip_entry, blind) if name == "last.ckpt" else (json_value, blind)
        beside = {key: data for key, data in run.items() if key != target}
        readers[name] = Reader(target, [run[target]], resume, mutations, beside)
    return readers
