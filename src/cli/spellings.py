"""train.py's flags as the older tools of this family spell them: RWKV-LM-RLHF, RWKV-PEFT and RWKV-LM.

Each old flag that train.py does not have itself is translated, ignored with a line that says why, or refused where it would
change the result. The other scripts' flags have the same names there and here.
"""

import json
import sys
from collections.abc import Collection, Iterator, Sequence

from src.errors import UserError

EPILOG = ("The flags of RWKV-LM-RLHF, RWKV-PEFT and RWKV-LM are understood too: translated, ignored with a note, or refused with "
          "what to do instead.")

RENAMED = {"--random_seed": "--seed", "--grad_clip": "--gradient_clip_val", "--data_file": "--train_data_file"}

# Values with which a flag of theirs, or of ours, stands for its absence.
ABSENT = {"--random_seed": ("-1",), "--vocab_size": ("0",), "--warmup_steps": ("-1",), "--optim": ("", "none"),
          "--load_adapter": ("",), "--data_file": ("",), "--quant_mode": ("none",)}

REWORDED = {
    ("--precision", "bf16-true"): ("--precision", "bf16"), ("--precision", "bf16-mixed"): ("--precision", "bf16"),
    ("--precision", "32"): ("--precision", "fp32"), ("--precision", "32-true"): ("--precision", "fp32"),
    ("--quant", "none"): ("--quant", "0"), ("--quant", "nf4"): ("--quant", "1", "--quant_mode", "nf4"),
    ("--quant", "int8"): ("--quant", "1", "--quant_mode", "int8"), ("--compile", ""): ("--compile", "1"),
}

IGNORED = {
    "the checkpoint tells its dimensions": ("--dim_att", "--dim_ffn", "--head_size", "--head_size_a", "--head_size_divisor"),
    "pairs are drawn pass by pass, and a run's length is --epoch_count times --epoch_steps":
        ("--magic_prime", "--my_random_steps", "--my_exit", "--my_exit_tokens", "--my_sample_len", "--data_type", "--dataload",
         "--random_mode", "--my_pile_version", "--my_pile_shift", "--infctx_dataset_multiplier", "--chunk_ctx"),
    "the layer profile has the learning rates": ("--layerwise_lr", "--my_pile_edecay"),
    "the kernels are chosen by themselves": ("--fla", "--l2warp_sparse"),
    "Lightning and DeepSpeed are left at their own": ("--ds_bucket_mb", "--enable_progress_bar", "--avg_loss"),
    "it belongs to what is not switched on":
        ("--state_output_mode", "--moe_experts", "--moe_active", "--moe_shared", "--moe_balance_alpha", "--grpo_gen_count",
         "--grpo_gen_length", "--grpo_gen_temperature", "--grpo_gen_topp", "--grpo_kl_beta", "--wpo_alpha", "--wpo_beta",
         "--temperature", "--alpha", "--smoothing", "--top_k", "--tiny_att_layer", "--mask_id", "--pissa_config", "--bone_config",
         "--svd_niter"),
}

# The values that change nothing, and what to do where another is given.
SERVED = {
    "--lora": (("1", ""), "the layer profile says what trains"),
    "--lora_dropout": (("0",), "write a layer profile with the column Dropout"),
    "--lora_load": (("",), "give the adapter by --load_adapter"),
    "--lora_parts": (("",), "write a layer profile with the column RejectParts"),
    "--limited_lora": (("1",), "mode lora trains the LoRA matrices alone; other parameters train in mode full"),
    "--train_parts": (("",), "write a layer profile with the column RejectParts"),
    "--train_type": (("", "none", "finetune"), "state tuning is a mode of the layer profile"),
    "--load_cold_adapter": (("",), "merge that adapter into the base with merge.py"),
    "--load_adapter_pissa_init": (("",), "merge that adapter into the base with the tool that made it"),
    "--load_partial": (("0",), "give a checkpoint that is whole"),
    "--state": (("0",), "state tuning is a mode of the layer profile"),
    "--state_tune": (("0",), "state tuning is a mode of the layer profile"),
    "--orpo_mode": (("1",), "the odds ratio is of the answers alone, which is mode 1"),
    "--wpo": (("0",), "take another --loss"),
    "--grpo": (("0",), "take another --loss"),
    "--zerocot": (("0",), "take another --loss"),
    "--distillation": (("0",), "take another --loss"),
    "--moe": (("0",), "mixtures of experts are not served"),
    "--dropout": (("0",), "write a layer profile with the column Dropout"),
    "--weight_decay": ((), "the layer profile's column Weight_decay rules, 0.01 with --layer_profile auto; leave it out"),
    "--weight_decay_final": (("-1",), "the layer profile's column Weight_decay rules; leave it out"),
    "--loss_mask": (("none",), "losses are over the answers, or with --sft_on_prompt 1 over prompt and answer; leave it out"),
    "--data_shuffle": (("1",), "pairs are always shuffled"),
    "--num_nodes": (("1",), "one machine is served"),
    "--train_stage": (("0",), "a checkpoint is trained further, not made anew"),
    "--my_pile_stage": (("0",), "a checkpoint is trained further, not made anew"),
    "--my_qa_mask": (("0",), "losses are over the answers by themselves"),
    "--pre_ffn": (("0",), "models are those of the official releases"),
    "--head_qk": (("0",), "models are those of the official releases"),
    "--tiny_att_dim": (("0",), "models are those of the official releases"),
    "--my_pos_emb": (("0",), "models are those of the official releases"),
    "--my_ffn_shift": (("1",), "models are those of the official releases"),
    "--my_att_shift": (("1",), "models are those of the official releases"),
}


def translate(arguments: Sequence[str], own: Collection[str]) -> list[str]:
    """The same command in train.py's own flags; what is ignored is told in one line on stderr.

    Args:
        own: train.py's own flags, which mean here what train.py says.

    Raises:
        UserError: an old flag with a value that would change the result and is not served.
    """
    reasons = {flag: reason for reason, flags in IGNORED.items() for flag in flags}
    translated: list[str] = []
    ignored: dict[str, list[str]] = {}
    for flag, value, words in _split(arguments):
        if flag in ABSENT and _is_among(value, ABSENT[flag]):
            continue
        if (flag, value) in REWORDED:
            translated += REWORDED[flag, value]
        elif flag in own:
            translated += words
        elif flag in RENAMED:
            translated += [RENAMED[flag], value]
        elif flag == "--lora_config":
            translated += _lora_config(value)
        elif flag in SERVED:
            values, instead = SERVED[flag]
            if not _is_among(value, values):
                raise UserError(f"{f'{flag} {value}'.strip()} is not served; {instead}")
        elif flag in reasons:
            ignored.setdefault(reasons[flag], []).append(flag)
        else:
            translated += words
    if ignored:
        told = "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in ignored.items())
        print(f"note: ignored: {told}", file=sys.stderr)
    return translated


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each flag, its value ("" for none), and the words they were; words that belong to no flag come with the flag ""."""
    at = 0
    while at < len(arguments):
        flag, equals, value = arguments[at].partition("=") if arguments[at].startswith("--") else ("", "", "")
        takes_next = flag and not equals and at + 1 < len(arguments) and not arguments[at + 1].startswith("--")
        words = list(arguments[at:at + 2 if takes_next else at + 1])
        yield flag, words[1] if takes_next else value, words
        at += len(words)


def _is_among(value: str, values: Sequence[str]) -> bool:
    """Numbers by value, so that 0.0 is 0."""
    return value in values or _number(value) in {_number(other) for other in values} - {None}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _lora_config(value: str) -> list[str]:
    """RWKV-PEFT's `{"lora_load": "", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.01}`."""
    try:
        config = dict(json.loads(value))
    except (ValueError, TypeError):
        raise UserError(f"--lora_config {value} is no JSON object; write --lora_r and --lora_alpha instead") from None
    words = [word for name in ("lora_r", "lora_alpha") if name in config for word in (f"--{name}", str(config.pop(name)))]
    for name, setting in config.items():
        if f"--{name}" not in SERVED:
            raise UserError(f"--lora_config: {name} is unknown; write --lora_r and --lora_alpha instead")
        values, instead = SERVED[f"--{name}"]
        if not _is_among(str(setting), values):
            raise UserError(f"--lora_config: {name} {setting} is not served; {instead}")
    return words
