"""Flags that are wrong, contradict something, or are not supported: reported in one line before anything is written."""

import importlib.util

import pytest
import torch

from src.quantization.strategy import parse_strategy
from tests.cli.conftest import SCRIPTS

GENERATE, PREPARE, TRAIN = "rlhf_generate_reject_csv", "rlhf_dpo_generate_save", "train"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_or_shortened_or_missing_flag(fails, good, script):
    fails(script, {"--no_such_flag": "1"}, "--no_such_flag")
    first = next(iter(good(script)))
    fails(script, {first: None}, first)
    fails(script, {first: None, first[:-1]: good(script)[first]}, first)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_every_flag(capsys, script):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "None" not in text and "False" not in text and "True" not in text


@pytest.mark.parametrize(("script", "flag", "value"), [
    (GENERATE, "--strategy", "cuda"), (GENERATE, "--strategy", "cpu fp8"), (GENERATE, "--strategy", "cpu fp32 *10 -> cpu bf16"),
    (GENERATE, "--strategy", ""), (GENERATE, "--top_p", "0"), (GENERATE, "--top_p", "1.5"), (GENERATE, "--top_p", "nan"),
    (GENERATE, "--temperature", "-1"), (GENERATE, "--temperature", "inf"), (GENERATE, "--top_k", "-1"), (GENERATE, "--presence",
    "nan"),
    (GENERATE, "--frequency", "inf"), (GENERATE, "--penalty_decay", "2"), (GENERATE, "--max_tokens", "0"), (GENERATE, "--seed",
    "-1"),
    (GENERATE, "--seed", "99999999999999999999"), (GENERATE, "--batch_size", "0"), (GENERATE, "--overwrite", "yes"),
    (PREPARE, "--strategy", "tpu bf16"), (PREPARE, "--strategy", "cpu fp32i4"), (PREPARE, "--target_pair_count", "0"),
    (PREPARE, "--target_pair_count", "many"), (PREPARE, "--rlhf_max_corpus_len", "0"), (PREPARE, "--rlhf_max_corpus_len", "3"),
    (PREPARE, "--peft", "boat"), (PREPARE, "--lora_r", "0"), (TRAIN, "--peft", "boat"), (TRAIN, "--peft", "freeze"),
    (PREPARE, "--batch_tokens", "-5"), (PREPARE, "--seed", "1.5"),
    (TRAIN, "--infctx", "1"), (TRAIN, "--dpo", "0"), (TRAIN, "--quant_mode", "fp8"), (TRAIN, "--precision", "fp16"),
    (TRAIN, "--strategy", "deepspeed_stage_2_offload"), (TRAIN, "--strategy", "fsdp"), (TRAIN, "--my_testing", "x052"),
    (TRAIN, "--accelerator", "tpu"), (TRAIN, "--gpu_arch", "metal"), (TRAIN, "--quant", "2"), (TRAIN, "--ctx_len", "0"),
    (TRAIN, "--micro_bsz", "0"), (TRAIN, "--epoch_steps", "-1"), (TRAIN, "--batch_tokens", "-1"),
    (TRAIN, "--epoch_count", "-1"), (TRAIN, "--epoch_begin", "-1"),
    (TRAIN, "--epoch_save", "0"), (TRAIN, "--accumulate_grad_batches", "0"), (TRAIN, "--lr_init", "nan"), (TRAIN, "--lr_init",
    "-1e-5"),
    (TRAIN, "--lr_final", "inf"), (TRAIN, "--lr_init", "fast"), (TRAIN, "--beta1", "1"), (TRAIN, "--beta2", "-0.1"),
    (TRAIN, "--adam_eps", "0"), (TRAIN, "--dpo_beta", "0"), (TRAIN, "--dpo_beta", "nan"), (TRAIN, "--dpo_alpha", "-1"),
    (TRAIN, "--gradient_clip_val", "-1"), (TRAIN, "--lora_r", "0"), (TRAIN, "--lora_alpha", "0"), (TRAIN, "--warmup_steps", "-2"),
    (TRAIN, "--devices", "0"), (TRAIN, "--seed", "99999999999999999999"), (TRAIN, "--rlhf_max_corpus_len", "0"),
    (TRAIN, "--samples", "-1"), (TRAIN, "--sample_tokens", "0"), (TRAIN, "--tensorboard", "out"),
])
def test_a_value_that_is_out_of_range_or_not_served(fails, script, flag, value):
    fails(script, {flag: value}, flag)


@pytest.mark.parametrize(("package", "value"), [("tensorboard", "1"), ("wandb", "a project")])
def test_a_logger_that_is_not_installed(fails, monkeypatch, package, value):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find_spec(name, *more))
    fails(TRAIN, {f"--{package}": value}, f"--{package}", f"pip install {package}")


@NO_GPU
def test_a_gpu_that_is_not_there(fails):
    fails(TRAIN, {"--accelerator": "gpu"}, "--accelerator gpu", "--accelerator cpu")
    for script in (GENERATE, PREPARE):
        fails(script, {"--strategy": "cuda bf16"}, "--strategy 'cuda bf16'", "cpu fp32")


@pytest.mark.parametrize("script", [GENERATE, PREPARE, "evaluate"])
def test_devices_of_a_strategy_have_ascii_digits_and_are_there(fails, monkeypatch, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for value in ("cuda:٣ bf16", "cuda:１ bf16", "cuda: bf16", "cuda:-1 bf16", f"cuda:{'9' * 20} bf16",
                  f"cuda:{'9' * 5000} bf16"):
        assert len(fails(script, {"--strategy": value}, "--strategy 'cuda:", "is not understood")) < 300
    for value in ("cuda:4 bf16", "cuda:128 bf16", "cuda:256 bf16", "cuda:999999999 fp16"):
        fails(script, {"--strategy": value}, "no such CUDA device")
    assert parse_strategy("cuda:3 bf16").device == parse_strategy("cuda:03 bf16").device == torch.device("cuda:3")
    assert parse_strategy("cuda bf16").device == torch.device("cuda")


def test_values_that_contradict_one_another(fails):
    fails(TRAIN, {"--rlhf_max_corpus_len": 1024}, "--rlhf_max_corpus_len 1024", "--ctx_len 512")
    fails(TRAIN, {"--compile": 1, "--grad_cp": 1}, "--compile 1", "--grad_cp 1")
    for flag, value, found in (("--n_layer", 24, 2), ("--n_embd", 2048, 64), ("--vocab_size", 65536, 256), ("--my_testing",
        "x060", "x070")):
        fails(TRAIN, {flag: value}, f"{flag} says {value}", f"has {found}")
