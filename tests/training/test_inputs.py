"""What a run reads: which pairs it takes and with what lines, whose references it refuses, and the rates in force."""

import hashlib
import json
from pathlib import Path

import pytest

from src.checkpoint.dimensions import Dimensions
from src.errors import UserError
from src.preference.entries import Pair
from src.preference.pairs import save_pairs
from src.training.inputs import Data, check_flags, layer_settings, read_inputs, training_pairs
from tests.random_checkpoint import random_weights
from tests.settings import changed
from tests.stored_pairs import stored
from tests.tiny import tiny_dimensions

PAIR = Pair([1, 2, 3], [4], [5, 6], -1.0, -2.0)
PLAIN = {"quantization": None, "unquantized_blocks": [], "quantized_otherwise": {}}
MADE_WITH = {"base_model": "base.pth", "base_fingerprint": "aa", "precision": "fp32", **PLAIN}


@pytest.fixture(scope="module")
def dimensions() -> Dimensions:
    return tiny_dimensions("x070", 8)


@pytest.fixture
def read(config, dimensions, tmp_path):
    """`read(pairs, sidecar, held, **flags)`: the data and lines of a run on a base whose fingerprint is aa."""
    def read(pairs=(PAIR,), sidecar=MADE_WITH, held=PLAIN, **flags) -> tuple[Data, list[str]]:
        path = tmp_path / "pairs.save"
        save_pairs(path, stored(list(pairs)), sidecar or {})
        if sidecar is None:
            (tmp_path / "pairs.save.json").unlink()
        lines: list[str] = []
        run = config(rlhf_train_file=str(path), load_model="base.pth", rlhf_max_corpus_len=10, **flags)
        return training_pairs(str(path), run, dimensions, "aa", held, lines), lines

    return read


def test_flags_about_the_base_must_be_right(dimensions):
    found = {"--n_layer": 2, "--n_embd": 32, "--vocab_size": 256, "--my_testing": "x070"}
    check_flags(dimensions, found, "base.pth")
    check_flags(dimensions, dict.fromkeys(found), "base.pth")
    for flag, value in {"--n_layer": 3, "--n_embd": 64, "--vocab_size": 0, "--my_testing": "x060"}.items():
        with pytest.raises(UserError, match=f"{flag} says {value}, but base.pth has {found[flag]}"):
            check_flags(dimensions, found | {flag: value}, "base.pth")


@pytest.mark.parametrize("advanced, profile, rates", [
    (True, "mine", (5e-5, 6e-6)), (False, "mine", (1e-3, 1e-4)), (True, "auto", (1e-3, 1e-4)), (False, "auto", (1e-3, 1e-4)),
])
def test_the_profiles_own_rates_are_in_force_with_lr_advanced_alone(config, dimensions, tmp_path, advanced, profile, rates):
    if profile == "mine":
        profile = tmp_path / "profile.csv"
        profile.write_text("Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay\nemb,freeze,,,,,,\n"
                           "0,lora,4,8,0,5e-5,6e-6,0\n1,lora,4,8,0,5e-5,6e-6,0\nhead,freeze,,,,,,\n")
    run = config(rlhf_train_file="pairs.save", layer_profile=str(profile), lr_advanced=advanced, lr_init=1e-3, lr_final=1e-4)
    blocks = layer_settings(run.model, run.steps, random_weights(dimensions))[1:-1]
    assert [(block.weight_lr_init, block.weight_lr_final) for block in blocks] == [rates] * 2
    assert [(block.mode, block.rank, block.alpha) for block in blocks] == [("lora", 4, 8.0)] * 2
    if profile == "auto":  # whose rows have the rates of what trains alone
        assert [(block.state_lr_init, block.state_lr_final) for block in blocks] == [(0, 0)] * 2


def test_pairs_that_are_left_out_are_counted_in_a_line_and_in_the_report(read, tmp_path):
    long, empty = Pair([1] * 9, [4], [5, 6], -1.0, -2.0), Pair([1], [], [5], 0.0, -2.0)
    data, lines = read([PAIR, long, empty, long])
    assert data.pairs == [PAIR] and data.path == str(tmp_path / "pairs.save")
    assert lines == [f"{data.path}: left out 2 pairs longer than 10 tokens and 1 with an empty answer; 1 remain"]
    assert (data.facts["pairs"], data.facts["too_long"], data.facts["empty_answer"]) == (1, 2, 1)
    assert data.sidecar == data.facts["sidecar"] and data.sidecar["count"] == 4
    for one, words in ((long, "left out 1 pairs longer"), (empty, "and 1 with an empty answer")):
        assert words in read([PAIR, one])[1][0]
    assert read()[1] == []


def test_a_saves_checksum_is_the_sidecars_or_is_made(read, tmp_path):
    made = [read(sidecar=sidecar)[0].sha256() for sidecar in (MADE_WITH, None)]
    assert made == [hashlib.sha256((tmp_path / "pairs.save").read_bytes()).hexdigest()] * 2


def test_without_a_sidecar_a_line_says_what_cant_be_checked(read):
    data, [line] = read(sidecar=None)
    assert line.startswith(f"warning: {data.path} has no pairs.save.json") and "base.pth at fp32" in line
    assert data.facts["sidecar"] is None and data.pairs == [PAIR]


def test_references_of_none_or_of_another_base_are_refused_unless_the_loss_has_none(read):
    without = [PAIR._replace(chosen_base_prob=0.0, reject_base_prob=0.0)]
    for sidecar in (MADE_WITH | {"references": False}, None):
        with pytest.raises(UserError, match="made without references, which --loss ipo needs; .* --loss simpo, orpo or cpo"):
            read(without, sidecar, loss="ipo")
    other = MADE_WITH | {"base_fingerprint": "bb", "base_model": "other.pth"}
    with pytest.raises(UserError, match=r"with another base model \(other.pth\) than base.pth"):
        read(sidecar=other, allow_reference_mismatch=True)
    with pytest.raises(UserError, match=r"another base model \(unnamed\)"):
        read(sidecar={})
    for pairs, sidecar in ((without, MADE_WITH | {"references": False}), ([PAIR], other), ([PAIR], None)):
        data, lines = read(pairs, sidecar, loss="simpo")
        assert data.pairs == pairs and not lines


@pytest.mark.parametrize("made, held, flags, advice", [
    ({"precision": "bf16"}, {}, {}, "--strategy 'cpu fp32',"),
    ({"precision": "fp32"}, {}, {"precision": "bf16", "accelerator": "gpu"}, "--strategy 'cuda bf16',"),
    ({}, {"quantization": "nf4"}, {"quantization": "nf4"}, "--strategy 'cpu fp32nf4',"),
    ({"quantization": "int8"}, {"quantization": "nf4"}, {"quantization": "nf4"}, "--strategy 'cpu fp32nf4',"),
    ({"quantization": "int8"}, {"quantization": "int8", "unquantized_blocks": [1]},
     {"quantization": "int8", "layer_profile": "mine.csv"}, "--strategy 'cpu fp32i8' --layer_profile mine.csv,"),
    ({"quantization": "nf4"}, {"quantization": "nf4", "quantized_otherwise": {"blocks.0.att.key.weight": "pissa"}},
     {"quantization": "nf4", "peft": "pissa", "lora_r": 4},
     "--strategy 'cpu fp32nf4' --layer_profile auto --peft pissa --lora_r 4,"),
])
def test_references_made_otherwise_are_refused_with_the_flags_that_fit(read, made, held, flags, advice):
    held, made = PLAIN | held, MADE_WITH | made
    here = {"precision": flags.get("precision", "fp32"), **held}
    differences = {name for name in here if made[name] != here[name]}
    with pytest.raises(UserError, match="margins would not start at 0") as refused:
        read(sidecar=made, held=held, **flags)
    assert advice in str(refused.value) and all(f"{name}: " in str(refused.value) for name in differences)
    data, lines = read(sidecar=made, held=held, **flags, allow_reference_mismatch=True)
    assert data.pairs == [PAIR]
    assert len(lines) == len(differences) and all(line.startswith(f"warning: {data.path}: ") for line in lines)
    assert {line.split(": ")[2] for line in lines} == differences


@pytest.fixture
def texts(config, tmp_path):
    """A run on texts, some of which are evaluated on."""
    for name, answers in {"texts": ("A.", "B."), "held_out": ("C.",)}.items():
        rows = [json.dumps({"prompt": "What?", "chosen": answer}) for answer in answers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return changed(config(rlhf_train_file="pairs.save"), rlhf_train_file=None, sft=True, tokenizer="bytes",
                   train_data_file=str(tmp_path / "texts.jsonl"), eval_file=str(tmp_path / "held_out.jsonl"))


def test_texts_are_read_and_summarized(texts, capsys):
    inputs = read_inputs(texts, {})
    assert [len(data.texts) for data in (inputs.train, inputs.held_out)] == [2, 1]
    facts = inputs.train.facts
    assert {name: facts[name] for name in ("texts", "rows", "cut", "dropped", "tokenizer")} == {
        "texts": 2, "rows": 2, "cut": 0, "dropped": 0, "tokenizer": "bytes"}
    assert facts["trained"] == sum(sum(text.trained[1:]) for text in inputs.train.texts)
    first, second = [line for line in capsys.readouterr().err.splitlines() if "rows make" in line]
    assert first.startswith(f"{texts.data.train_data_file}: 2 rows make 2 texts, with a loss on {facts['trained']} tokens")
    assert second.startswith(f"{texts.data.eval_file}: 1 rows make 1 texts")
    assert inputs.train.sha256() == hashlib.sha256(Path(inputs.train.path).read_bytes()).hexdigest()


def test_a_run_without_held_out_data_has_none(texts):
    assert read_inputs(changed(texts, eval_file=None), {}).held_out is None
