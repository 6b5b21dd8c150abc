"""The parts of a run by themselves: its model, config.json, what is said, samples, and its last lines."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

import src.training.run as run_file
from src.adapters.files import adapter_tensors
from src.adapters.layer_profile import LayerSetting, auto_layer_profile
from src.data.packing import Text
from src.errors import UserError
from src.model import build_model
from src.preference.entries import Pair
from src.training.inputs import Data, Inputs
from src.training.run import _model, _prepare, _samples, _say_what_trains, _what_takes_less, finish
from tests.random_checkpoint import random_weights
from tests.tiny import tiny_dimensions

LORA = auto_layer_profile(2, 1e-3, 1e-4, rank=4, alpha=8.0)
PAIRS = [Pair([1, 2, 3], [4, 5], [6], -3.0, -4.0), Pair([7], [8], [9, 10], -5.0, -6.0)]


@pytest.fixture
def inputs(tmp_path):
    """`inputs(train, held_out)`: what a run of two blocks starts from."""
    (tmp_path / "pairs.save").write_bytes(b"pairs")
    (tmp_path / "held_out.save").write_bytes(b"held out")

    def make(items=PAIRS, held_out: bool = False) -> Inputs:
        dimensions = tiny_dimensions("x070", 8)
        data = Data(str(tmp_path / "pairs.save"), items, {"pairs": len(items)})
        other = Data(str(tmp_path / "held_out.save"), items, {"pairs": 1, "sidecar": {"sha256": "of the sidecar"}})
        return Inputs(random_weights(dimensions), dimensions, "fingerprint", [*LORA], data, other if held_out else None, [])

    return make


# The model


class Built(Exception):
    """Where a model would have been built."""


@pytest.mark.parametrize(("machine", "device"), [
    ({"accelerator": "cpu"}, "cpu"), ({"accelerator": "cpu", "devices": 2}, "cpu"), ({"accelerator": "gpu"}, "cuda"),
    ({"accelerator": "gpu", "devices": 2}, "cpu")])
def test_where_the_weights_go(config, inputs, monkeypatch, machine, device):
    """With several GPUs Lightning moves each process's own. The system gets freed memory back late on a CPU alone."""
    recycled = []

    def built(weights, dimensions, dtype, where, *_, **__):
        raise Built(where)

    monkeypatch.setattr(run_file, "build_model", built)
    monkeypatch.setattr(run_file, "recycle_memory", lambda: recycled.append(True))
    with pytest.raises(Built, match=f"^{device}$"):
        _model(inputs(), config(**machine))
    assert bool(recycled) == (machine["accelerator"] == "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_with_adapters_and_no_second_copy(config, inputs, precision):
    given = inputs()
    base = dict(given.weights)
    model = _model(given, config(precision=precision))
    assert given.weights == {}
    held = model.state_dict()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert held["head.weight"].dtype == dtype and held["head.weight"].equal(base["head.weight"].to(dtype))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(re.search(r"blocks\.[01]\..*lora", name) for name in trained)
    again, other = _model(inputs(), config()), _model(inputs(), config(seed=1))
    ours, same, another = (adapter_tensors(one) for one in (model, again, other))
    assert all(tensor.equal(same[name]) for name, tensor in ours.items())
    assert not all(tensor.equal(another[name]) for name, tensor in ours.items())


def test_what_trains_in_full_is_not_quantized(config, inputs):
    given = inputs()
    given.settings[2] = LayerSetting("1", "full", weight_lr_init=1e-3, weight_lr_final=1e-4)
    base, model = dict(given.weights), _model(given, config(quantization="int8"))
    plain = {name for name, parameter in model.named_parameters() if name in base and parameter.equal(base[name])}
    assert "blocks.1.att.key.weight" in plain and "blocks.0.att.key.weight" not in plain


@pytest.mark.parametrize("asked", [False, True])
def test_compiled_are_the_two_halves_of_each_block_for_any_length(config, inputs, monkeypatch, asked):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append((self, how)))
    model = _model(inputs(), config(compile=asked))
    halves = [half for block in model.blocks for half in (block.att, block.ffn)]
    assert [half for half, _ in compiled] == (halves if asked else [])
    assert all(how == {"dynamic": True} for _, how in compiled)


# config.json


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("tokenizer", ["world", None, "tokenizer.json"])
def test_what_config_json_holds_beside_the_flags(config, inputs, tmp_path, monkeypatch, held_out, tokenizer):
    monkeypatch.chdir(tmp_path)
    Path("world").touch()  # no tokenizer, whatever it is
    if tokenizer == "tokenizer.json":
        tokenizer = str(tmp_path / tokenizer)
        Path(tokenizer).write_bytes(b"{}")
    run, given = config(tokenizer=tokenizer), inputs(held_out=held_out)
    model = build_model(given.weights, given.dimensions)
    Path(run.run.proj_dir).mkdir()
    assert _prepare(Path(run.run.proj_dir), run, given, model, trained=17, total_steps=8) is None
    written = json.loads(Path(run.run.proj_dir, "config.json").read_text())
    expected = {
        "base": {"version": "x070", "n_layer": 2, "n_embd": 32, "vocab_size": 256}, "base_fingerprint": "fingerprint",
        "trained_parameters": 17, "total_steps": 8, "rlhf_train_sha256": hashlib.sha256(b"pairs").hexdigest(),
        "train_data": {"pairs": 2}, "eval_sha256": "of the sidecar" if held_out else None,
        "eval_data": {"pairs": 1, "sidecar": {"sha256": "of the sidecar"}} if held_out else None,
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest() if tokenizer not in (None, "world") else None}
    assert {name: written[name] for name in expected} == expected
    rows = written["layer_profile_rows"]
    assert [(row["layer"], row["mode"], row["rank"]) for row in rows] == [(one.layer, one.mode, one.rank) for one in LORA]


def test_a_name_of_a_tokenizer_that_is_no_file_here_is_none(config, inputs, tmp_path):
    run, given = config(tokenizer=str(tmp_path / "gone.json")), inputs()
    Path(run.run.proj_dir).mkdir()
    _prepare(Path(run.run.proj_dir), run, given, build_model(given.weights, given.dimensions), 17, 8)
    assert json.loads(Path(run.run.proj_dir, "config.json").read_text())["tokenizer_sha256"] is None


# What is said


@pytest.mark.parametrize(("flags", "items", "line"), [
    ({}, PAIRS, "x070 L2 D32, 1,234 trained parameters, 2 pairs, 8 optimizer steps, fp32"),
    ({"quantization": "nf4", "precision": "bf16"}, PAIRS,
     "x070 L2 D32, 1,234 trained parameters, 2 pairs, 8 optimizer steps, bf16 nf4"),
    ({"loss": "kto"}, PAIRS, "x070 L2 D32, 1,234 trained parameters, 2 thumbs, 8 optimizer steps, fp32"),
    ({"sft": True}, [Text([1, 2], [True, True])], "x070 L2 D32, 1,234 trained parameters, 1 texts, 8 optimizer steps, fp32"),
])
def test_what_trains_is_said(config, inputs, capsys, flags, items, line):
    _say_what_trains(config(**flags), inputs(items), 1234, 8)
    assert capsys.readouterr().err == line + "\n"


@pytest.mark.parametrize(("warmup_steps", "warned"), [(7, False), (8, True), (9, True)])
def test_so_is_a_warm_up_without_an_end(config, inputs, capsys, warmup_steps, warned):
    _say_what_trains(config(warmup_steps=warmup_steps), inputs(), 1234, 8)
    assert (f"--warmup_steps {warmup_steps}" in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("flags", "ways"), [
    ({"micro_bsz": 1}, ["--grad_cp 1", "--quant 1", "a smaller --rlhf_max_corpus_len"]),
    ({"micro_bsz": 2}, ["a smaller --micro_bsz", "--grad_cp 1", "--quant 1", "a smaller --rlhf_max_corpus_len"]),
    ({"micro_bsz": 1, "batch_tokens": 9, "grad_cp": True},
     ["a smaller --batch_tokens", "--quant 1", "a smaller --rlhf_max_corpus_len"]),
    ({"micro_bsz": 2, "grad_cp": True, "quantization": "int8"}, ["a smaller --micro_bsz", "a smaller --rlhf_max_corpus_len"]),
])
def test_what_takes_less_memory_and_is_not_taken_yet(config, flags, ways):
    told = _what_takes_less(config(**flags), MemoryError())
    assert told == f"the machine's memory is full; take {', '.join(ways)} or a smaller model"


# Samples


def answer(*_) -> list:
    return []


@pytest.mark.parametrize("flags", [{"samples": 0}, {"samples": 2, "sft": True}, {"samples": 2, "strategy": "deepspeed_stage_3"},
                                   {"samples": 2, "strategy": "deepspeed_stage_3_offload"}])
def test_there_are_no_samples(config, inputs, tmp_path, capsys, flags):
    assert _samples(tmp_path, config(**flags), answer, inputs().train, 256) is None
    assert ("warning: no samples" in capsys.readouterr().err) == ("strategy" in flags)
    assert _samples(tmp_path, config(samples=2), None, inputs().train, 256) is None


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2"])
def test_there_are_some(config, inputs, tmp_path, capsys, strategy):
    found = _samples(tmp_path, config(samples=1, sample_tokens=9, strategy=strategy), answer, inputs().train, 256)
    assert (found.questions.tokens, found.max_tokens, found.answer) == ([[1, 2, 3]], 9, answer)
    assert found.path == tmp_path / "samples.jsonl" and capsys.readouterr().err == ""


def test_without_the_pairs_tokenizer_there_are_none(config, inputs, tmp_path, capsys):
    data = Data("pairs.save", PAIRS, {"sidecar": {"tokenizer": str(tmp_path / "gone.json")}})
    assert _samples(tmp_path, config(samples=1), answer, data, 256) is None
    assert "gone.json" in capsys.readouterr().err


# The end


@pytest.fixture
def ended(tmp_path):
    """A folder of a run of two steps."""
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "dpo_loss": 0.5, "lr": 1e-3}}\n' for step in (1, 2)))
    (tmp_path / "eval.jsonl").write_text('{"step": 0, "loss": 0.7}\n')
    return tmp_path


def test_at_the_end_there_are_curves_and_a_report_and_the_files_are_named(ended, monkeypatch, capsys):
    monkeypatch.setattr(run_file, "write_report", lambda folder: (folder / "report.html").touch())
    finish(ended)
    assert (ended / "curves.png").exists()
    assert capsys.readouterr().err == f"done: {ended}/metrics.jsonl, {ended}/report.html\n"


def test_curves_and_a_report_that_can_not_be_made_cost_a_warning_each(ended, monkeypatch, capsys):
    def fails(name: str):
        def fail(*_) -> None:
            raise UserError(f"{name}: cannot be written")

        return fail

    monkeypatch.setattr(run_file, "draw_curves", fails("curves.png"))
    monkeypatch.setattr(run_file, "write_report", fails("report.html"))
    (ended / "rwkv-final.safetensors").touch()
    finish(ended)
    assert capsys.readouterr().err.splitlines() == [
        "warning: curves.png: cannot be written", "warning: report.html: cannot be written",
        f"done: {ended}/rwkv-final.safetensors, {ended}/metrics.jsonl"]
