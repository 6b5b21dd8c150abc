"""The flags of train.py: those of its settings, those that only the command line has, and how they are resolved."""

import importlib.util
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from src.adapters.layer_profile import NEEDED as NEEDED_BY_MODE
from src.adapters.layer_profile import has_rates
from src.cli.parser import NoEffect, Parser, notes
from src.cli.spellings import EPILOG, translate
from src.data.binidx import corpus_at
from src.data.source import data_ending
from src.errors import UserError
from src.preference.loss import LOSSES, needs_reference, takers
from src.settings import build, flag, flags_of, group
from src.training.config import TrainConfig
from src.values import Reader, is_utf8, positive, zero_or_one

QUANT_MODES = ("nf4", "int8")
TAKEN_BY = {setting.name: losses for setting, losses in takers().items()}


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    quant: bool = flag(zero_or_one, False, "1: quantize the linear weights of frozen blocks")
    quant_mode: str = flag(Reader(str, " or ".join(QUANT_MODES)), "nf4", f"with --quant 1: {' or '.join(QUANT_MODES)}")
    n_layer: int | None = flag(positive, None, "if given, checked against the checkpoint, like the next three", free=True)
    n_embd: int | None = flag(positive, None, "checked against the checkpoint", free=True)
    vocab_size: int | None = flag(positive, None, "checked against the checkpoint", free=True)
    my_testing: str | None = flag(("x060", "x070"), None,
                                  "RWKV version, checked against the checkpoint: x060 is v6, x070 is v7", free=True)


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    ctx_len: int = flag(positive, 4096, "longest sequence, in tokens, that the run is meant for")


@dataclass(frozen=True, kw_only=True)
class ObjectiveFlags:
    dpo: bool | None = flag(zero_or_one, None, "1: the same as --loss dpo")
    orpo: bool | None = flag(zero_or_one, None, "1: the same as --loss orpo")
    simpo: bool | None = flag(zero_or_one, None, "1: the same as --loss simpo")
    infctx: bool = flag(zero_or_one, False, "not supported yet; 0")


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    gpu_arch: str = flag(("cuda", "rocm"), "cuda", "kind of GPU that torch was built for; rocm is untested", free=True)


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Flags that determine a setting or are only checked; the configuration does not hold them."""

    model: ModelFlags = group("model")
    data: DataFlags = group("data")
    objective: ObjectiveFlags = group("objective")
    machine: MachineFlags = group("machine")


# `--orpo 1` for `--loss orpo`.
SWITCHES = tuple(name for name, _, _ in flags_of(ObjectiveFlags) if name in LOSSES)


def parser() -> Parser:
    return Parser("Preference training of an RWKV v6 or v7 model through adapters: DPO or another loss, with a share of SFT.",
                  TrainConfig, CommandLine, epilog=EPILOG)


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, dict[str, Any], tuple[str, ...]]:
    """The run's configuration, the model dimensions that the flags state, and lines on flags that have no effect.

    Raises:
        UserError: a flag that is unknown, not supported yet, or out of its range.
    """
    own = parser()
    arguments, mentions = translate(arguments, own.flags())
    flags = vars(own.parse_args(arguments))
    given = own.given(arguments)
    if flags["infctx"]:
        raise UserError("--infctx 1: training in pieces on texts longer than the context (infctx) is not supported yet; "
                        "leave it at 0")
    for name, needed in (("train_data_file", flags["sft"]), ("rlhf_train_file", not flags["sft"])):
        if bool(flags[name]) != needed:
            raise UserError(f"--{name} {'is needed with' if needed else 'is not used with'} --sft {flags['sft']:d} (see --help)")
    _settle_loss(flags, given)
    _settle_machine(flags)
    _check_packages(flags)
    rules = _without_effect(flags)
    if flags["quant_mode"] not in QUANT_MODES:
        raise UserError(f"--quant_mode {flags['quant_mode']} is not supported; take {' or '.join(QUANT_MODES)}")
    flags["quantization"] = flags["quant_mode"] if flags["quant"] else None
    limit = flags["rlhf_max_corpus_len"] = flags["rlhf_max_corpus_len"] or flags["ctx_len"]
    if limit > flags["ctx_len"]:
        raise UserError(f"--rlhf_max_corpus_len {limit} is above --ctx_len {flags['ctx_len']}; lower it or raise --ctx_len")
    expected = {f"--{name}": flags[name] for name in ("n_layer", "n_embd", "vocab_size", "my_testing")}
    for name, _, _ in flags_of(CommandLine):
        del flags[name]
    return build(TrainConfig, flags), expected, notes(given, rules, mentions)


def _check_packages(flags: dict[str, Any]) -> None:
    """Raises UserError where this machine lacks what --compile, --tensorboard or --wandb needs."""
    if flags["compile"] and flags["grad_cp"]:
        raise UserError("--compile 1 and --grad_cp 1 exclude each other: checkpointing can't see into compiled blocks; drop one")
    if flags["compile"] and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--compile 1 needs a C++ compiler, and none was found; install g++, or leave it at 0")
    if flags["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard 1: tensorboard is not installed; run pip install tensorboard, or leave the flag out")
    if flags["wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb: wandb is not installed; run pip install wandb, or leave the flag out")
    if (flags["tensorboard"] or flags["wandb"]) and not is_utf8(flags["proj_dir"]):
        raise UserError("--wandb and --tensorboard can't write to a folder whose path is not UTF-8; choose another --proj_dir")


def _without_effect(flags: dict[str, Any]) -> list[NoEffect]:
    """The rules, on resolved flags (those of quantization aside). What only the run can know, it reports itself."""
    sft, peft, auto = flags["sft"], flags["peft"], flags["layer_profile"] == "auto"
    flags_rule = auto or not has_rates(flags["layer_profile"])
    texts = [file for file in (flags["train_data_file"], flags["eval_file"]) if sft and file]
    share = LOSSES[flags["loss"]].sft_share
    return [
        NoEffect(f"{' '.join((*TAKEN_BY, *SWITCHES))} allow_reference_mismatch", sft, "--sft 1 has no preferences"),
        NoEffect("samples sample_tokens", sft, "--sft 1 writes no samples"),
        NoEffect("tokenizer skip_bad_rows", not sft, "a .save holds tokens"),
        NoEffect("skip_bad_rows sft_on_prompt loss_on",
                 all(data_ending(file) == ".txt" or corpus_at(file) for file in texts) and sft,
                 "documents have no rows and no prompts"),
        NoEffect("quant_mode", not flags["quant"], "without --quant 1 no weight is quantized"),
        NoEffect("peft lora_r lora_alpha", not auto, "the layer profile says what trains"),
        NoEffect("lora_r", "Rank" not in NEEDED_BY_MODE[peft], f"--peft {peft} has no rank"),
        NoEffect("lora_alpha", "Alpha" not in NEEDED_BY_MODE[peft], f"--peft {peft} has no alpha"),
        NoEffect("lr_init lr_final", flags["lr_advanced"] and not flags_rule, "the layer profile's rates are used"),
        NoEffect("lr_advanced", flags_rule, "--lr_init and --lr_final are used without a layer profile that has rates"),
        NoEffect("sft_on_prompt", not sft and share is not None and flags[share.name] == 0,
                 "the SFT loss has weight 0"),
        NoEffect("micro_bsz", bool(flags["batch_tokens"]), "--batch_tokens says how much a micro-batch holds"),
        NoEffect("optim", flags["strategy"].endswith("_offload"), "DeepSpeed's offload has an AdamW of its own"),
        NoEffect("gpu_arch", flags["accelerator"] == "cpu", "the run is on the CPU"),
        NoEffect("sample_tokens", not flags["samples"], "--samples 0 writes none"),
        NoEffect("allow_reference_mismatch", not needs_reference(flags["loss"]), f"--loss {flags['loss']} has no reference"),
    ]


def _settle_loss(flags: dict[str, Any], given: Collection[str]) -> None:
    """Resolve the one loss, named by --loss or by its switch; refuse flags that it does not take."""
    named = [name for name in SWITCHES if flags[name]]
    words = [f"--loss {flags['loss']}"] * ("--loss" in given) + [f"--{name} 1" for name in named]
    if flags["sft"]:
        if words:
            raise UserError(f"--sft 1 and {' and '.join(words)} contradict each other; a run has one objective")
        return  # the loss keeps its default, which is not used
    if len({*named, *([flags["loss"]] if "--loss" in given else [])}) > 1:
        raise UserError(f"{' and '.join(words)} contradict each other; a run has one objective")
    loss = flags["loss"] = flags["loss"] if "--loss" in given else (named or [flags["loss"]])[0]
    if flags.get(loss) is False:
        raise UserError(f"--{loss} 0: no objective is left; name one with --loss {', '.join(LOSSES)}")
    for name, losses in TAKEN_BY.items():
        if f"--{name}" in given and loss not in losses:
            raise UserError(f"--{name} is not used by --loss {loss}, only by {', '.join(losses)}; leave it out")
    if loss == "robust" and not flags["label_smoothing"]:
        raise UserError("--loss robust needs --label_smoothing above 0, the chance that a pair's labels are swapped")


def _settle_machine(flags: dict[str, Any]) -> None:
    """Resolve accelerator and precision for this machine, and check them."""
    has_gpu = torch.cuda.is_available()
    if flags["accelerator"] == "auto":
        flags["accelerator"] = "gpu" if has_gpu else "cpu"
    flags["precision"] = flags["precision"] or ("bf16" if flags["accelerator"] == "gpu" else "fp32")
    if flags["precision"] not in ("fp32", "bf16"):
        raise UserError(f"--precision {flags['precision']} is not supported for training; take bf16 or fp32")
    if flags["accelerator"] == "gpu":
        if not has_gpu:
            raise UserError("--accelerator gpu: torch finds no GPU here; use --accelerator cpu --strategy auto, "
                            "or check the driver")
        if (flags["gpu_arch"] == "rocm") != (torch.version.hip is not None):
            built = "rocm" if torch.version.hip is not None else "cuda"
            raise UserError(f"--gpu_arch {flags['gpu_arch']}: the installed torch was built for {built}")
        if flags["devices"] > torch.cuda.device_count():
            raise UserError(f"--devices {flags['devices']}: this machine has {torch.cuda.device_count()}")
    elif flags["devices"] > (most := max(4, os.cpu_count() or 1)):
        raise UserError(f"--devices {flags['devices']}: on this CPU take at most {most}, each is a process of its own")
    elif flags["strategy"].startswith("deepspeed"):
        raise UserError(f"--strategy {flags['strategy']} needs --accelerator gpu; on the CPU use --strategy auto")
