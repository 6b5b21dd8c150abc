"""The parts of a run by themselves: its processes' folders and words, its model, config.json, samples, and its last lines."""

import hashlib
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import src.training.run as run_file
from src.adapters.files import adapter_tensors
from src.adapters.layer_profile import LayerSetting
from src.checkpoint.io import load_checkpoint
from src.data.packing import Text
from src.errors import UserError
from src.files import LOCK_FILE
from src.model import build_model
from src.training.environment import First
from src.training.inputs import Data, Inputs
from src.training.run import _model, _prepare, _samples, _say_what_trains, _what_takes_less, finish, train
from src.training.watching import Samples
from tests.random_checkpoint import random_weights
from tests.tiny import tiny_dimensions
from tests.training.test_environment import BY_HAND

LORA = [LayerSetting("emb", "freeze"),
        *(LayerSetting(block, "lora", rank=4, alpha=8, weight_lr_init=1e-3, weight_lr_final=1e-4) for block in ("0", "1")),
        LayerSetting("head", "freeze")]
PAIRS = [([1, 2, 3], [4, 5], [6], -3.0, -4.0), ([7], [8], [9, 10], -5.0, -6.0)]


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


# The first process and the others


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


def test_an_adapter_to_continue_from(config, request):
    run = config(epoch_count=1, epoch_steps=1)
    train(run, {})
    fits = request.getfixturevalue("fits")  # from now on
    final = Path(run.run.proj_dir) / "rwkv-final.safetensors"
    train(config(load_adapter=str(final), seed=1, proj_dir=run.run.proj_dir + "-further"), {})
    written, held = load_checkpoint(final), adapter_tensors(fits[-1].module.model)
    assert written.keys() == held.keys() and all(tensor.equal(held[name]) for name, tensor in written.items())


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


def test_held_out_prompts_are_answered_where_there_are_some(config, prepared, given, fits, tmp_path):
    given({})
    pairs = torch.load(prepared("x070"), weights_only=True)
    torch.save([(pairs[0][0] + [65], *pairs[0][1:])], other := tmp_path / "other.save")
    for flags in ({}, {"eval_file": str(other)}):
        train(config(samples=1, proj_dir=str(tmp_path / f"run{len(flags)}"), **flags), {}, answer)
    asked = [one.questions.tokens for fit in fits for one in fit.callbacks if isinstance(one, Samples)]
    assert asked == [[list(pairs[0][0])], [[*pairs[0][0], 65]]]


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


def test_the_first_process_alone_ends_the_run(config, given, monkeypatch):
    given({})
    finished = []
    monkeypatch.setattr(run_file, "finish", finished.append)
    for first in (True, False):
        monkeypatch.setattr(run_file, "fit", lambda *_, first=first: SimpleNamespace(is_global_zero=first))
        train(config(proj_dir=f"{config().run.proj_dir}{first}"), {})
    assert finished == [Path(f"{config().run.proj_dir}True")]
