"""train.py's flags as earlier tools spell them: RWKV-LM-RLHF, RWKV-PEFT and RWKV-LM.

An old flag that train.py does not have itself is translated, ignored with a line that says why, or refused where it would
change the result. The other scripts' flags have the same names there and here.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from src.checked_json import BadJson, parse_json
from src.console import say
from src.errors import UserError
from src.numbers import read_number

EPILOG = ("The flags of RWKV-LM-RLHF, RWKV-PEFT and RWKV-LM are accepted too: translated, ignored with a note, or refused with a "
          "hint at what to do instead.")

RENAMED = {"--random_seed": "--seed", "--grad_clip": "--gradient_clip_val", "--data_file": "--train_data_file"}

# Values that mean the same as leaving the flag out, for their flags and ours.
ABSENT = {"--random_seed": ("-1",), "--vocab_size": ("0",), "--warmup_steps": ("-1",), "--optim": ("", "none"),
          "--quant_mode": ("none",)}

REWORDED = {
    ("--precision", "bf16-true"): ("--precision", "bf16"), ("--precision", "bf16-mixed"): ("--precision", "bf16"),
    ("--precision", "32"): ("--precision", "fp32"), ("--precision", "32-true"): ("--precision", "fp32"),
    ("--quant", "none"): ("--quant", "0"), ("--quant", "nf4"): ("--quant", "1", "--quant_mode", "nf4"),
    ("--quant", "int8"): ("--quant", "1", "--quant_mode", "int8"),
    ("--peft", "disha"): ("--peft", "bone"), ("--peft", "miss"): ("--peft", "bone"),
}

# What a flag without a value means; an empty value is different.
BARE = {"--compile": ("--compile", "1")}

NOT_SWITCHED_ON = "it belongs to a feature that is not switched on"
IGNORED = {
    "read from the checkpoint": ("--dim_att", "--dim_ffn", "--head_size", "--head_size_a", "--head_size_divisor"),
    "pairs are drawn pass by pass, and a run's length is --epoch_count times --epoch_steps":
        ("--magic_prime", "--my_random_steps", "--my_exit", "--my_exit_tokens", "--my_sample_len", "--dataload",
         "--random_mode", "--my_pile_version", "--my_pile_shift", "--infctx_dataset_multiplier", "--chunk_ctx"),
    "a file's ending says what it holds": ("--data_type",),
    "the layer profile has the learning rates": ("--layerwise_lr", "--my_pile_edecay"),
    "the kernels are chosen automatically": ("--fla", "--l2warp_sparse"),
    "Lightning and DeepSpeed keep their defaults": ("--ds_bucket_mb", "--enable_progress_bar", "--avg_loss"),
    NOT_SWITCHED_ON:
        ("--state_output_mode", "--moe_experts", "--moe_active", "--moe_shared", "--moe_balance_alpha", "--grpo_gen_count",
         "--grpo_gen_length", "--grpo_gen_temperature", "--grpo_gen_topp", "--grpo_kl_beta", "--wpo_alpha", "--wpo_beta",
         "--temperature", "--alpha", "--smoothing", "--top_k", "--tiny_att_layer", "--mask_id", "--svd_niter"),
}

_ELSEWHERE = "merge that adapter into the base with the tool that made it"
_OFFICIAL = "only models like the official releases are; leave it out"
_LOSSES = "take another --loss"

# The values that change nothing, and what to do instead of giving another.
SUPPORTED_VALUES = {
    "--lora": (("1", ""), "the layer profile says what trains"),
    "--lora_dropout": (("0",), "write a layer profile with the column Dropout"),
    "--lora_load": (("",), f"give an adapter of train.py by --load_adapter; if it is another tool's, {_ELSEWHERE}"),
    "--lora_parts": (("",), "write a layer profile with the columns RejectParts and FullParts"),
    "--limited_lora": (("1",), "mode lora trains only its matrices; name other parameters in the layer profile's FullParts"),
    "--train_parts": (("", "[]"), "write a layer profile with the column FullParts"),
    "--train_type": (("", "none"), "leave it out"),
    "--load_cold_adapter": (("",), _ELSEWHERE),
    "--load_adapter_pissa_init": (("",), _ELSEWHERE),
    "--load_partial": (("0",), "give a complete checkpoint"),
    "--state": (("0",), "give --peft state, or write mode state into the layer profile's rows"),
    "--state_tune": (("0",), "give --peft state, or write mode state into the layer profile's rows"),
    "--orpo_mode": (("1",), "the odds ratio is over the answers only, which is mode 1"),
    "--wpo": (("0",), _LOSSES),
    "--grpo": (("0",), _LOSSES),
    "--zerocot": (("0",), _LOSSES),
    "--distillation": (("0",), _LOSSES),
    "--moe": (("0",), _OFFICIAL),
    "--dropout": (("0",), "the layer profile's column Dropout sets dropout on an adapter's input; leave it out"),
    "--weight_decay": ((), "the layer profile's column Weight_decay sets it, 0.01 with --layer_profile auto; leave it out"),
    "--weight_decay_final": (("-1",), "the layer profile's column Weight_decay sets it; leave it out"),
    "--loss_mask": (("qa",), "leave it out: with --sft 1 the loss is over the answers, with --sft_on_prompt 1 over all tokens"),
    "--data_shuffle": (("1",), "pairs and texts are always shuffled; leave it out"),
    "--num_nodes": (("1",), "run on one machine"),
    "--train_stage": (("0",), "give the checkpoint to start from with --load_model, or resume a run with --resume 1"),
    "--my_pile_stage": (("0",), "give the checkpoint to start from with --load_model, or resume a run with --resume 1"),
    "--my_qa_mask": (("0",), "leave it out: with --sft 1 prompts have no loss"),
    "--sft_field": ((), "name the columns of --train_data_file prompt and completion"),
    "--sft_split": (("train",), "write the rows to train on to a file of their own"),
    "--pre_ffn": (("0",), _OFFICIAL),
    "--head_qk": (("0",), _OFFICIAL),
    "--tiny_att_dim": (("0",), _OFFICIAL),
    "--my_pos_emb": (("0",), _OFFICIAL),
    "--my_ffn_shift": (("1",), _OFFICIAL),
    "--my_att_shift": (("1",), _OFFICIAL),
}

# What to do instead of one particular value, where that differs.
INSTEAD = {
    ("--train_type", "state"): "give --peft state, or write mode state into the layer profile's rows",
    ("--train_type", "finetune"): "give --peft full, or a layer profile with mode full",
    ("--train_type", "infctx"): "leave it out: with --sft 1 a document over --ctx_len is cut into pieces",
    ("--loss_mask", "se"): "leave it out and put prompts and answers into columns: with --sft 1 the loss is over the answers",
}

# Which tokens have a loss with --sft 1, and what it reads. `none` and `pad`: all tokens of a text; `none` includes padding, but
# there is none here. `qa`: what follows each "Assistant:", with the word itself.
ON_ALL_TOKENS = ("none", "pad")
SFT_TYPES = (("", "none", "utf-8", "jsonl", "sft", "binidx"),
             "give the texts themselves as --train_data_file, in CSV, JSONL, Parquet or .txt, in UTF-8, or a binidx")

# RWKV-PEFT's adapter settings as JSON: the modes of each flag, and what each name is here: a flag, or values that change nothing.
CONFIGS: dict[str, tuple[tuple[str, ...], dict[str, str | tuple[Sequence[str], str] | None]]] = {
    "--lora_config": (("lora",), {"lora_r": "--lora_r", "lora_alpha": "--lora_alpha",
                                  "lora_load": SUPPORTED_VALUES["--lora_load"],
                                  "lora_dropout": SUPPORTED_VALUES["--lora_dropout"],
                                  "lora_parts": SUPPORTED_VALUES["--lora_parts"]}),
    "--pissa_config": (("pissa",), {"pissa_r": "--lora_r", "pissa_load": SUPPORTED_VALUES["--lora_load"],
                                    "pissa_init": (("",), _ELSEWHERE), "svd_niter": None}),
    "--bone_config": (("bone", "disha", "miss"), {"bone_r": "--lora_r", "bone_load": SUPPORTED_VALUES["--lora_load"],
                                                  "bone_mode": (("bone",), "mode bone is the paper's second version")}),
    "--disha_config": (("bone", "disha", "miss"), {"r": "--lora_r", "load": SUPPORTED_VALUES["--lora_load"],
                                                   "mode": (("bone",), "mode bone is the paper's second version")}),
}


def translate(arguments: Sequence[str], own: Collection[str]) -> tuple[list[str], Counter[str]]:
    """The same command in train.py's own flags; one line on stderr names what is ignored.

    The last occurrence of a flag counts, also where its value means the same as leaving it out.

    Args:
        own: train.py's own flags; they keep their meaning.

    Returns:
        The command, and how often the given one has each flag, by its name here where it has one.

    Raises:
        UserError: an old flag with a value that would change the result and is not supported.
    """
    given = {flag: value for flag, value, _ in _split(arguments)}
    sft, peft = given.get("--sft") == "1", given.get("--peft", "lora")
    translated: list[tuple[str, list[str]]] = []
    mentions: Counter[str] = Counter()
    ignored: dict[str, list[str]] = {}
    for flag, value, words in _split(arguments):
        if flag not in own and (reason := _why_ignored(flag, value, sft, peft)):
            ignored.setdefault(reason, []).append(flag)
            continue
        name, made = RENAMED.get(flag, flag), _meaning(flag, value, words, own)
        if flag == "--loss_mask" and "--sft_on_prompt" in given:
            made = []
        if made != words:  # of its own flags argparse takes the last one
            translated = [(other, those) for other, those in translated if other != name]
        translated.append((name, made))
        mentions[name] += bool(flag)
    if ignored:
        lists = "; ".join(f"{', '.join(dict.fromkeys(flags))} ({reason})" for reason, flags in ignored.items())
        say(f"note: ignored: {lists}")
    return [word for _, words in translated for word in words], mentions


def _why_ignored(flag: str, value: str, sft: bool, peft: str) -> str | None:
    if flag in CONFIGS:
        return None if peft in CONFIGS[flag][0] else NOT_SWITCHED_ON
    if flag == "--loss_mask" and value in ON_ALL_TOKENS and not sft:
        return "a preference loss is over the answers"
    if flag == "--data_type" and sft:
        _require(flag, value, *SFT_TYPES)
    return next((reason for reason, flags in IGNORED.items() if flag in flags), None)


def _meaning(flag: str, value: str, words: list[str], own: Collection[str]) -> list[str]:
    """One flag in train.py's own flags; words that belong to no flag, and unknown flags, stay as they are."""
    if flag in ABSENT and _is_among(value, ABSENT[flag]):
        return []
    if (flag, value) in REWORDED:
        return list(REWORDED[flag, value])
    if words == [flag] and flag in BARE:
        return list(BARE[flag])
    if flag in own:
        return words
    if flag in RENAMED:
        return [f"{RENAMED[flag]}={value}"]
    if flag in CONFIGS:
        return _config(flag, value, CONFIGS[flag][1])
    if flag == "--loss_mask" and value in ON_ALL_TOKENS:
        return ["--sft_on_prompt", "1"]
    if flag in SUPPORTED_VALUES:
        _require(flag, value, *SUPPORTED_VALUES[flag])
        return []
    return words


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each flag, its value ("" for none), and its words in the command; words that belong to no flag have the flag ""."""
    at = 0
    while at < len(arguments):
        flag, equals, value = arguments[at].partition("=") if arguments[at].startswith("--") else ("", "", "")
        takes_next = flag and not equals and at + 1 < len(arguments) and not arguments[at + 1].startswith("--")
        words = list(arguments[at:at + 2 if takes_next else at + 1])
        yield flag, words[1] if takes_next else value, words
        at += len(words)


def _require(flag: str, value: str, values: Sequence[str], instead: str) -> None:
    """Raise UserError for a value that would change the result."""
    if not _is_among(value, values):
        raise UserError(f"{f'{flag} {value}'.strip()} is not supported; {INSTEAD.get((flag, value), instead)}")


def _is_among(value: str, values: Sequence[str]) -> bool:
    """Compares numbers by value, so that 0.0 equals 0."""
    return value in values or read_number(value) in {read_number(other) for other in values} - {None}


def _config(flag: str, value: str, names: Mapping[str, str | tuple[Sequence[str], str] | None]) -> list[str]:
    """RWKV-PEFT's `{"lora_load": "", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.01}`, or its like, as flags."""
    flags = " and ".join(name for name in names.values() if isinstance(name, str))
    try:
        config = parse_json(value, {str: (str, int, float, bool)})
    except (BadJson, UnicodeEncodeError) as error:
        raise UserError(f"{flag} {value[:80]} is not supported: {error}; write {flags} instead") from None
    words: list[str] = []
    for name, setting in config.items():
        if name not in names:
            raise UserError(f"{flag}: {name} is unknown; write {flags} instead")
        meaning = names[name]
        if isinstance(meaning, str):
            words.append(f"{meaning}={setting}")
        elif meaning is not None:
            _require(f"{flag}: {name}", str(setting), *meaning)
    return words
