"""The flags of train.py."""

import importlib.util
import os
import shutil
from collections.abc import Collection, Sequence
from typing import Any

import torch

from src.adapters.layer_profile import BLOCK_MODES, NEEDED, has_rates
from src.cli.parser import DATA_FORMATS, SKIP_BAD_ROWS, NoEffect, Parser, notes
from src.cli.spellings import EPILOG, translate
from src.cli.values import (
    is_utf8,
    not_negative,
    number,
    path,
    positive,
    rate,
    seed,
    strength,
    tokenizer,
    wandb_project,
    weight,
    whole,
    zero_or_one,
)
from src.data.source import data_ending
from src.errors import UserError
from src.numbers import BELOW_ONE
from src.preference.loss import LOSSES, needs_reference, takes
from src.training.config import TrainConfig

STRATEGIES = ("auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload", "deepspeed_stage_3",
              "deepspeed_stage_3_offload")
QUANT_MODES = ("nf4", "int8")
# `--orpo 1` for `--loss orpo`.
SWITCHES = ("dpo", "orpo", "simpo")
ON_DPOS_MARGIN = tuple(loss for loss in LOSSES if needs_reference(loss))
TAKEN_BY = {"dpo_beta": ON_DPOS_MARGIN, "dpo_alpha": ON_DPOS_MARGIN, "orpo_alpha": ("orpo",), "simpo_beta": ("simpo",),
            "simpo_gamma": ("simpo",), "simpo_alpha": ("simpo",), "cpo_beta": ("cpo",), "cpo_alpha": ("cpo",),
            "label_smoothing": tuple(loss for loss in LOSSES if takes(loss, "label_smoothing"))}
# What weighs the SFT loss; orpo's weight is always 1.
SFT_SHARE = {"simpo": "simpo_alpha", "cpo": "cpo_alpha", "orpo": None}


def parser() -> Parser:
    parser = Parser("Preference training of an RWKV v6 or v7 model through adapters: DPO or another loss, with a share of SFT.")
    parser.epilog = EPILOG
    add = parser.add_argument
    model = parser.add_argument_group("model").add_argument
    model("--load_model", type=path, required=True, help="base checkpoint, the official .pth or .safetensors")
    model("--n_layer", type=positive, help="checked against the checkpoint where given; so are the next three")
    model("--n_embd", type=positive, help="checked against the checkpoint")
    model("--vocab_size", type=positive, help="checked against the checkpoint")
    model("--my_testing", choices=("x060", "x070"), help="RWKV version, checked against the checkpoint: x060 is v6, x070 is v7")
    model("--quant", type=zero_or_one, default="0", help="1 holds the frozen blocks' linear weights quantized")
    model("--quant_mode", default="nf4", help=f"with --quant 1: {' or '.join(QUANT_MODES)}")
    model("--layer_profile", type=path, default="auto",
          help="CSV that says which layer trains and how (layerprofile/readme.md), or auto: every block alike, by the next three")
    model("--peft", choices=BLOCK_MODES, default="lora", help="with --layer_profile auto: mode of every block")
    model("--lora_r", type=positive, default=16, help="with --layer_profile auto: rank")
    model("--lora_alpha", type=strength, default=32.0, help="with --layer_profile auto: alpha")
    model("--load_adapter", type=path,
          help="adapter file to go on from, of the same base and layer profile; the references stay the base's")

    data = parser.add_argument_group("data").add_argument
    data("--rlhf_train_file", type=path, help=".save file of rlhf_dpo_generate_save.py; needed but with --sft 1")
    data("--train_data_file", type=path,
         help=f"with --sft 1: prompts and answers, conversations or plain text, as {DATA_FORMATS}, or documents as .txt")
    data("--skip_bad_rows", type=zero_or_one, default="0", help=f"with --sft 1, {SKIP_BAD_ROWS}")
    data("--tokenizer", type=tokenizer,
         help="with --sft 1: world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given (65536 world, "
              "256 bytes)")
    data("--eval_file", type=path,
         help="held-out pairs (.save), or with --sft 1 texts like --train_data_file: evaluated before the first step and after "
              "each epoch")
    data("--ctx_len", type=positive, default=4096, help="longest sequence, in tokens, that the run is meant for")
    data("--rlhf_max_corpus_len", type=positive,
         help="pairs longer than this many tokens are left out, with the count told (--ctx_len where not given)")

    loss = parser.add_argument_group("objective").add_argument
    loss("--sft", type=zero_or_one, default="0",
         help="1: no preferences; next-token prediction on --train_data_file, of prompts with answers only the answers")
    loss("--loss", choices=tuple(LOSSES), help="dpo where not given; simpo, orpo and cpo have no reference")
    for name in SWITCHES:
        loss(f"--{name}", type=zero_or_one, help=f"1: the same as --loss {name}")
    loss("--dpo_beta", type=strength, default=0.01, help="dpo, ipo, hinge, robust: strength of the pull towards the reference")
    loss("--dpo_alpha", type=weight, default=0.1, help="dpo, ipo, hinge, robust: share of the SFT loss on the chosen answers")
    loss("--label_smoothing", type=number(1e-6, 0.4999, or_zero=True), default=0.0,
         help="dpo, robust, simpo, cpo: chance that a pair's labels are swapped, below 0.5")
    loss("--orpo_alpha", type=strength, default=0.1,
         help="orpo: weight of the odds ratio beside the SFT loss, the paper's lambda")
    loss("--simpo_beta", type=strength, default=2.0, help="simpo: scale of the answers' mean log-probabilities")
    loss("--simpo_gamma", type=weight, default=1.0, help="simpo: margin to be reached")
    loss("--simpo_alpha", type=weight, default=0.0, help="simpo: share of the SFT loss on the chosen answers")
    loss("--cpo_beta", type=strength, default=0.1, help="cpo: scale of the answers' log-probabilities")
    loss("--cpo_alpha", type=weight, default=1.0, help="cpo: share of the SFT loss on the chosen answers")
    loss("--sft_on_prompt", type=zero_or_one, default="0", help="1: the SFT loss is over prompt and answer, with --sft 1 too")
    loss("--infctx", type=zero_or_one, default="0", help="not served yet; 0")

    steps, decay = parser.add_argument_group("steps and rates").add_argument, number(*BELOW_ONE, or_zero=True)
    steps("--epoch_steps", type=not_negative, default=200,
          help="micro-batches an epoch on each device; 0: as many as see every pair once")
    steps("--epoch_count", type=whole(1, 10**6), default=1, help="epochs to train")
    steps("--epoch_begin", type=whole(0, 10**6), default=0,
          help="number of epochs done before: file names and the order of pairs go on from it")
    steps("--epoch_save", type=positive, default=1, help="save the adapter every so many epochs, and at the end")
    steps("--micro_bsz", type=whole(1, 4096), default=1, help="pairs in a micro-batch, which is what a device computes at once")
    steps("--batch_tokens", type=whole(0, 10**6), default=0,
          help="instead of --micro_bsz: tokens in a micro-batch, which takes as many pairs of like lengths as they hold")
    steps("--accumulate_grad_batches", type=whole(1, 10**5), default=1,
          help="micro-batches an optimizer step on each device; the last step of an epoch takes those left; the gradient is that "
               "of the mean over all pairs of the step (over its tokens with --sft 1), however they are split")
    steps("--lr_init", type=rate, default=1e-5, help="first learning rate, where the layer profile does not rule")
    steps("--lr_final", type=rate, default=1e-6, help="last learning rate, likewise")
    steps("--lr_advanced", type=zero_or_one, default="1",
          help="1: the layer profile's rates rule; 0: --lr_init and --lr_final rule everywhere")
    steps("--warmup_steps", type=not_negative, default=0, help="optimizer steps of linear warm-up")
    steps("--beta1", type=decay, default=0.9, help="AdamW")
    steps("--beta2", type=decay, default=0.999, help="AdamW")
    steps("--adam_eps", type=number(1e-30, 1e3), default=1e-8, help="AdamW")
    steps("--optim", choices=("adamw", "adamw_8bit"), default="adamw",
          help="adamw_8bit holds its averages in 8 bits (bitsandbytes): a quarter of their memory")
    steps("--gradient_clip_val", type=number(1e-12, 1e12, or_zero=True), default=1.0,
          help="largest gradient norm; 0 does not clip")
    steps("--grad_cp", type=zero_or_one, default="0", help="1: gradient checkpointing, much less memory for somewhat more time")
    steps("--compile", type=zero_or_one, default="0",
          help="1: torch.compile the blocks: steps some percent faster after a minute or two of compiling")

    machine = parser.add_argument_group("machine").add_argument
    machine("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where there is one")
    machine("--devices", type=whole(1, 1024), default=1, help="number of GPUs, or of processes on the CPU")
    machine("--precision",
            help="fp32 or bf16; trained weights are held in float32 either way; bf16 on a GPU, fp32 on the CPU where not given")
    machine("--strategy", choices=STRATEGIES, default="auto", help="Lightning's strategy")
    machine("--gpu_arch", choices=("cuda", "rocm"), default="cuda",
            help="kind of GPU that torch was built for; rocm was never tried")

    add("--proj_dir", type=path, required=True,
        help="folder of the run: report.html, adapters, metrics.jsonl, and what else it writes")
    add("--wandb", type=wandb_project, default="",
        help="wandb project, entity/project, or its address; offline where its server can't be used; empty: none")
    add("--tensorboard", type=zero_or_one, default="0", help="1: the same for TensorBoard, in the run's folder tensorboard")
    add("--samples", type=whole(0, 1000), default=3,
        help="held-out prompts (of the training pairs without --eval_file) answered before the first step and after each epoch, "
             "for the report; 0: none")
    add("--sample_tokens", type=whole(1, 10**4), default=100, help="longest such answer, in tokens")
    add("--resume", type=zero_or_one, default="0", help="1: go on where the run in --proj_dir was broken off")
    add("--seed", type=seed, default=0, help="order of pairs, adapters' random starts, dropout")
    add("--allow_reference_mismatch", type=zero_or_one, default="0",
        help="1: train even where the references were computed at another precision or quantization")
    return parser


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, dict[str, Any], tuple[str, ...]]:
    """The run's configuration, what the flags say of the model's dimensions, and lines on what the command says in vain.

    Raises:
        UserError: a flag that is unknown, not served yet, or out of its range.
    """
    own = parser()
    arguments, mentions = translate(arguments, own.flags())
    flags = vars(own.parse_args(arguments))
    given = own.given(arguments)
    if flags.pop("infctx"):
        raise UserError("--infctx 1: training on texts longer than the context in pieces (infctx) is not served yet; "
                        "leave it at 0")
    for name, needed in (("train_data_file", flags["sft"]), ("rlhf_train_file", not flags["sft"])):
        if bool(flags[name]) != needed:
            raise UserError(f"--{name} {'is needed with' if needed else 'has no use with'} --sft {flags['sft']:d} (see --help)")
    _settle_loss(flags, given)
    _check_machine(flags)
    if flags["compile"] and flags["grad_cp"]:
        raise UserError("--compile 1 and --grad_cp 1 do not go together: checkpointing can't look into compiled blocks; drop one")
    if flags["compile"] and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--compile 1 needs a C++ compiler, and none was found; install g++, or leave it at 0")
    if flags["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard 1: tensorboard is not installed; run pip install tensorboard, or leave the flag out")
    if flags["wandb"] and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb: wandb is not installed; run pip install wandb, or leave the flag out")
    if (flags["tensorboard"] or flags["wandb"]) and not is_utf8(flags["proj_dir"]):
        raise UserError("--wandb and --tensorboard write into no folder whose path is not UTF-8; choose another --proj_dir")
    rules = _without_effect(flags)
    quant, mode = flags.pop("quant"), flags.pop("quant_mode")
    if mode not in QUANT_MODES:
        raise UserError(f"--quant_mode {mode} is not served; take {' or '.join(QUANT_MODES)}")
    ctx_len = flags.pop("ctx_len")
    limit = flags["rlhf_max_corpus_len"] or ctx_len
    if limit > ctx_len:
        raise UserError(f"--rlhf_max_corpus_len {limit} is above --ctx_len {ctx_len}; raise the one or lower the other")
    flags["rlhf_max_corpus_len"] = limit
    expected = {f"--{name}": flags.pop(name) for name in ("n_layer", "n_embd", "vocab_size", "my_testing")}
    return TrainConfig(quantization=mode if quant else None, **flags), expected, notes(given, rules, mentions)


def _without_effect(flags: dict[str, Any]) -> list[NoEffect]:
    """Of flags that are settled but for those of quantization. What only the run can know, it tells itself."""
    sft, peft, auto = flags["sft"], flags["peft"], flags["layer_profile"] == "auto"
    flags_rule = auto or not has_rates(flags["layer_profile"])
    texts = [file for file in (flags["train_data_file"], flags["eval_file"]) if sft and file]
    return [
        NoEffect(f"{' '.join((*TAKEN_BY, *SWITCHES))} allow_reference_mismatch", sft, "--sft 1 has no preferences"),
        NoEffect("samples sample_tokens", sft, "--sft 1 writes no samples"),
        NoEffect("tokenizer skip_bad_rows", not sft, "a .save holds tokens"),
        NoEffect("skip_bad_rows sft_on_prompt", all(data_ending(file) == ".txt" for file in texts) and sft,
                 "a .txt has no rows and no prompts"),
        NoEffect("quant_mode", not flags["quant"], "without --quant 1 no weight is quantized"),
        NoEffect("peft lora_r lora_alpha", not auto, "the layer profile says what trains"),
        NoEffect("lora_r", "Rank" not in NEEDED[peft], f"--peft {peft} has no rank"),
        NoEffect("lora_alpha", "Alpha" not in NEEDED[peft], f"--peft {peft} has no alpha"),
        NoEffect("lr_init lr_final", flags["lr_advanced"] and not flags_rule, "the layer profile's rates rule"),
        NoEffect("lr_advanced", flags_rule, "--lr_init and --lr_final rule without a layer profile that has rates"),
        NoEffect("sft_on_prompt", not sft and flags.get(SFT_SHARE.get(flags["loss"], "dpo_alpha")) == 0,
                 "the SFT loss has no share in what is trained"),
        NoEffect("micro_bsz", bool(flags["batch_tokens"]), "--batch_tokens says how much a micro-batch holds"),
        NoEffect("optim", flags["strategy"].endswith("_offload"), "DeepSpeed's offload has an AdamW of its own"),
        NoEffect("gpu_arch", flags["accelerator"] == "cpu", "the run is on the CPU"),
        NoEffect("sample_tokens", not flags["samples"], "--samples 0 writes none"),
        NoEffect("allow_reference_mismatch", not needs_reference(flags["loss"]), f"--loss {flags['loss']} has no reference"),
    ]


def _settle_loss(flags: dict[str, Any], given: Collection[str]) -> None:
    """One loss, named by --loss or by its switch, and no flag that it does not take."""
    switches = {name: flags.pop(name) for name in SWITCHES}
    named = [name for name, value in switches.items() if value]
    if flags["sft"]:
        told = [f"--loss {flags['loss']}"] * bool(flags["loss"]) + [f"--{name} 1" for name in named]
        if told:
            raise UserError(f"--sft 1 and {' and '.join(told)} contradict each other; a run has one objective")
        flags["loss"] = "dpo"  # of which nothing is computed
        return
    if len({*named, flags["loss"] or (named or ["dpo"])[0]}) > 1:
        told = [f"--loss {flags['loss']}"] * bool(flags["loss"]) + [f"--{name} 1" for name in named]
        raise UserError(f"{' and '.join(told)} contradict each other; a run has one objective")
    loss = flags["loss"] = flags["loss"] or (named or ["dpo"])[0]
    if switches.get(loss) is False:
        raise UserError(f"--{loss} 0: no objective is left; name one by --loss {', '.join(LOSSES)}")
    for name, losses in TAKEN_BY.items():
        if f"--{name}" in given and loss not in losses:
            raise UserError(f"--{name} has no say in --loss {loss}, only in {', '.join(losses)}; leave it out")
    if loss == "robust" and not flags["label_smoothing"]:
        raise UserError("--loss robust needs --label_smoothing over 0, the chance that a pair's labels are swapped")


def _check_machine(flags: dict[str, Any]) -> None:
    """Settle accelerator and precision on this machine; `gpu_arch` has done its duty then."""
    has_gpu, architecture = torch.cuda.is_available(), flags.pop("gpu_arch")
    if flags["accelerator"] == "auto":
        flags["accelerator"] = "gpu" if has_gpu else "cpu"
    flags["precision"] = flags["precision"] or ("bf16" if flags["accelerator"] == "gpu" else "fp32")
    if flags["precision"] not in ("fp32", "bf16"):
        raise UserError(f"--precision {flags['precision']} is not served for training; take bf16 or fp32")
    if flags["accelerator"] == "gpu":
        if not has_gpu:
            raise UserError("--accelerator gpu: torch finds no GPU here; use --accelerator cpu --strategy auto, "
                            "or check the driver")
        if (architecture == "rocm") != (torch.version.hip is not None):
            built = "rocm" if torch.version.hip is not None else "cuda"
            raise UserError(f"--gpu_arch {architecture}: the installed torch was built for {built}")
        if flags["devices"] > torch.cuda.device_count():
            raise UserError(f"--devices {flags['devices']}: this machine has {torch.cuda.device_count()}")
    elif flags["devices"] > (most := max(4, os.cpu_count() or 1)):
        raise UserError(f"--devices {flags['devices']}: on this CPU take at most {most}, each of which is a process of its own")
    elif flags["strategy"].startswith("deepspeed"):
        raise UserError(f"--strategy {flags['strategy']} needs --accelerator gpu; on the CPU use --strategy auto")
