"""The flags of train.py."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from src.adapters.layer_profile import BLOCK_MODES
from src.cli.run import DATA_FORMATS, SKIP_BAD_ROWS, Parser, not_negative, positive, seed, zero_or_one
from src.cli.spellings import EPILOG, translate
from src.errors import UserError
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


def parser() -> Parser:
    parser = Parser("Preference training of an RWKV v6 or v7 model through adapters: DPO or another loss, with a share of SFT.")
    parser.epilog = EPILOG
    add = parser.add_argument
    model = parser.add_argument_group("model").add_argument
    model("--load_model", required=True, help="base checkpoint, the official .pth or .safetensors")
    model("--n_layer", type=positive, help="checked against the checkpoint where given; so are the next three")
    model("--n_embd", type=positive, help="checked against the checkpoint")
    model("--vocab_size", type=positive, help="checked against the checkpoint")
    model("--my_testing", choices=("x060", "x070"), help="RWKV version, checked against the checkpoint: x060 is v6, x070 is v7")
    model("--quant", type=zero_or_one, default="0", help="1 holds the frozen blocks' linear weights quantized")
    model("--quant_mode", default="nf4", help=f"with --quant 1: {' or '.join(QUANT_MODES)}")
    model("--layer_profile", default="auto",
          help="CSV that says which layer trains and how (layerprofile/readme.md), or auto: every block alike, by the next three")
    model("--peft", choices=BLOCK_MODES, default="lora", help="with --layer_profile auto: mode of every block")
    model("--lora_r", type=positive, default=16, help="with --layer_profile auto: rank")
    model("--lora_alpha", type=float, default=32.0, help="with --layer_profile auto: alpha")
    model("--load_adapter", help="adapter file to go on from, of the same base and layer profile; the references stay the base's")

    data = parser.add_argument_group("data").add_argument
    data("--rlhf_train_file", help=".save file of rlhf_dpo_generate_save.py; needed but with --sft 1")
    data("--train_data_file", help=f"with --sft 1: prompts and answers, conversations or plain text, as {DATA_FORMATS}, or "
                                    "documents as .txt")
    data("--skip_bad_rows", type=zero_or_one, default="0", help=f"with --sft 1, {SKIP_BAD_ROWS}")
    data("--tokenizer", help="with --sft 1: world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given "
                             "(65536 world, 256 bytes)")
    data("--eval_file", help="held-out pairs (.save), or with --sft 1 texts like --train_data_file: evaluated before the first "
                             "step and after each epoch")
    data("--ctx_len", type=positive, default=4096, help="longest sequence, in tokens, that the run is meant for")
    data("--rlhf_max_corpus_len", type=positive,
         help="pairs longer than this many tokens are left out, with the count told (--ctx_len where not given)")

    loss = parser.add_argument_group("objective").add_argument
    loss("--sft", type=zero_or_one, default="0",
         help="1: no preferences; next-token prediction on --train_data_file, of prompts with answers only the answers")
    loss("--loss", choices=tuple(LOSSES), help="dpo where not given; simpo, orpo and cpo have no reference")
    for name in SWITCHES:
        loss(f"--{name}", type=zero_or_one, help=f"1: the same as --loss {name}")
    loss("--dpo_beta", type=float, default=0.01, help="dpo, ipo, hinge, robust: strength of the pull towards the reference")
    loss("--dpo_alpha", type=float, default=0.1, help="dpo, ipo, hinge, robust: share of the SFT loss on the chosen answers")
    loss("--label_smoothing", type=float, default=0.0,
         help="dpo, robust, simpo, cpo: chance that a pair's labels are swapped, below 0.5")
    loss("--orpo_alpha", type=float, default=0.1, help="orpo: weight of the odds ratio beside the SFT loss, the paper's lambda")
    loss("--simpo_beta", type=float, default=2.0, help="simpo: scale of the answers' mean log-probabilities")
    loss("--simpo_gamma", type=float, default=1.0, help="simpo: margin to be reached")
    loss("--simpo_alpha", type=float, default=0.0, help="simpo: share of the SFT loss on the chosen answers")
    loss("--cpo_beta", type=float, default=0.1, help="cpo: scale of the answers' log-probabilities")
    loss("--cpo_alpha", type=float, default=1.0, help="cpo: share of the SFT loss on the chosen answers")
    loss("--sft_on_prompt", type=zero_or_one, default="0", help="1: the SFT loss is over prompt and answer, with --sft 1 too")
    loss("--infctx", type=zero_or_one, default="0", help="not served yet; 0")

    steps = parser.add_argument_group("steps and rates").add_argument
    steps("--epoch_steps", type=not_negative, default=200,
          help="micro-batches an epoch on each device; 0: as many as see every pair once")
    steps("--epoch_count", type=positive, default=1, help="epochs to train")
    steps("--epoch_begin", type=not_negative, default=0,
          help="number of epochs done before: file names and the order of pairs go on from it")
    steps("--epoch_save", type=positive, default=1, help="save the adapter every so many epochs, and at the end")
    steps("--micro_bsz", type=positive, default=1, help="pairs in a micro-batch, which is what a device computes at once")
    steps("--batch_tokens", type=not_negative, default=0,
          help="instead of --micro_bsz: tokens in a micro-batch, which takes as many pairs of like lengths as they hold")
    steps("--accumulate_grad_batches", type=positive, default=1,
          help="micro-batches an optimizer step on each device; the last step of an epoch takes those left; the gradient is that "
               "of the mean over all pairs of the step (over its tokens with --sft 1), however they are split")
    steps("--lr_init", type=float, default=1e-5, help="first learning rate, where the layer profile does not rule")
    steps("--lr_final", type=float, default=1e-6, help="last learning rate, likewise")
    steps("--lr_advanced", type=zero_or_one, default="1",
          help="1: the layer profile's rates rule; 0: --lr_init and --lr_final rule everywhere")
    steps("--warmup_steps", type=not_negative, default=0, help="optimizer steps of linear warm-up")
    steps("--beta1", type=float, default=0.9, help="AdamW")
    steps("--beta2", type=float, default=0.999, help="AdamW")
    steps("--adam_eps", type=float, default=1e-8, help="AdamW")
    steps("--optim", choices=("adamw", "adamw_8bit"), default="adamw",
          help="adamw_8bit holds its averages in 8 bits (bitsandbytes): a quarter of their memory")
    steps("--gradient_clip_val", type=float, default=1.0, help="largest gradient norm; 0 does not clip")
    steps("--grad_cp", type=zero_or_one, default="0", help="1: gradient checkpointing, much less memory for somewhat more time")
    steps("--compile", type=zero_or_one, default="0",
          help="1: torch.compile the blocks: steps some percent faster after a minute or two of compiling")

    machine = parser.add_argument_group("machine").add_argument
    machine("--accelerator", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where there is one")
    machine("--devices", type=positive, default=1, help="number of GPUs, or of processes on the CPU")
    machine("--precision",
            help="fp32 or bf16; trained weights are held in float32 either way; bf16 on a GPU, fp32 on the CPU where not given")
    machine("--strategy", choices=STRATEGIES, default="auto", help="Lightning's strategy")
    machine("--gpu_arch", choices=("cuda", "rocm"), default="cuda",
            help="kind of GPU that torch was built for; rocm was never tried")

    add("--proj_dir", required=True, help="folder of the run: report.html, adapters, metrics.jsonl, and what else it writes")
    add("--wandb", default="", help="wandb project; offline where nobody is logged in; empty: none")
    add("--tensorboard", type=zero_or_one, default="0", help="1: the same for TensorBoard, in the run's folder tensorboard")
    add("--samples", type=not_negative, default=3,
        help="held-out prompts (of the training pairs without --eval_file) answered before the first step and after each epoch, "
             "for the report; 0: none")
    add("--sample_tokens", type=positive, default=100, help="longest such answer, in tokens")
    add("--resume", type=zero_or_one, default="0", help="1: go on where the run in --proj_dir was broken off")
    add("--seed", type=seed, default=0, help="order of pairs, adapters' random starts, dropout")
    add("--allow_reference_mismatch", type=zero_or_one, default="0",
        help="1: train even where the references were computed at another precision or quantization")
    return parser


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, dict[str, Any]]:
    """The run's configuration, and what the flags say of the model's dimensions.

    Raises:
        UserError: a flag that is unknown, not served yet, or out of its range.
    """
    own = parser()
    arguments = translate(arguments, own.flags())
    flags = vars(own.parse_args(arguments))
    if flags.pop("infctx"):
        raise UserError("--infctx 1: training on texts longer than the context in pieces (infctx) is not served yet; "
                        "leave it at 0")
    for name, needed in (("train_data_file", flags["sft"]), ("rlhf_train_file", not flags["sft"])):
        if bool(flags[name]) != needed:
            raise UserError(f"--{name} {'is needed with' if needed else 'has no use with'} --sft {flags['sft']:d} (see --help)")
    _settle_loss(flags, arguments)
    for name in ("lr_init", "lr_final", "gradient_clip_val", "dpo_alpha", "simpo_alpha", "simpo_gamma", "cpo_alpha"):
        if not 0 <= flags[name] < float("inf"):
            raise UserError(f"--{name} must be a finite number from 0 on, not {flags[name]}")
    for name in ("dpo_beta", "orpo_alpha", "simpo_beta", "cpo_beta", "adam_eps", "lora_alpha"):
        if not 0 < flags[name] < float("inf"):
            raise UserError(f"--{name} must be a finite number over 0, not {flags[name]}")
    for name in ("beta1", "beta2"):
        if not 0 <= flags[name] < 1:
            raise UserError(f"--{name} must be in [0, 1), not {flags[name]}")
    _check_machine(flags)
    if flags["compile"] and flags["grad_cp"]:
        raise UserError("--compile 1 and --grad_cp 1 do not go together: checkpointing can't look into compiled blocks; drop one")
    if flags["compile"] and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--compile 1 needs a C++ compiler, and none was found; install g++, or leave it at 0")
    if flags["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard 1: tensorboard is not installed; run pip install tensorboard, or leave the flag out")
    quant, mode = flags.pop("quant"), flags.pop("quant_mode")
    if mode not in QUANT_MODES:
        raise UserError(f"--quant_mode {mode} is not served; take {' or '.join(QUANT_MODES)}")
    ctx_len = flags.pop("ctx_len")
    limit = flags["rlhf_max_corpus_len"] or ctx_len
    if limit > ctx_len:
        raise UserError(f"--rlhf_max_corpus_len {limit} is above --ctx_len {ctx_len}; raise the one or lower the other")
    flags["rlhf_max_corpus_len"] = limit
    expected = {f"--{name}": flags.pop(name) for name in ("n_layer", "n_embd", "vocab_size", "my_testing")}
    return TrainConfig(quantization=mode if quant else None, **flags), expected


def _settle_loss(flags: dict[str, Any], arguments: Sequence[str]) -> None:
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
    given = {word.partition("=")[0] for word in arguments}
    for name, losses in TAKEN_BY.items():
        if f"--{name}" in given and loss not in losses:
            raise UserError(f"--{name} has no say in --loss {loss}, only in {', '.join(losses)}; leave it out")
    if not 0 <= flags["label_smoothing"] < 0.5:
        raise UserError(f"--label_smoothing must be from 0 up to, not including, 0.5, not {flags['label_smoothing']}")
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
    elif flags["strategy"].startswith("deepspeed"):
        raise UserError(f"--strategy {flags['strategy']} needs --accelerator gpu; on the CPU use --strategy auto")
