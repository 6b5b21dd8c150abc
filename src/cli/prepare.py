"""The flags of rlhf_dpo_generate_save.py."""

from collections.abc import Sequence

from src.adapters.modes import ADAPTERS
from src.cli.parser import NoEffect, Parser, notes
from src.errors import UserError
from src.files import existing_file
from src.preference.config import PrepareConfig
from src.quantization.strategy import parse_strategy
from src.settings import build


def parser() -> Parser:
    return Parser("Tokenize preference pairs and cache the base model's log-probabilities of their answers.", PrepareConfig)


def parse(arguments: Sequence[str]) -> tuple[PrepareConfig, tuple[str, ...]]:
    """The configuration, and lines on flags that have no effect.

    Raises UserError for a flag that is unknown, missing or out of its range.
    """
    own = parser()
    known, unknown = own.parse_known_args(arguments)
    flags = vars(known)
    if not flags["load_model"] and not (flags["check_data"] and flags["tokenizer"]):
        raise UserError("--load_model is needed: the base checkpoint (see --help)")
    if not flags["output_save"] and not flags["check_data"]:
        raise UserError("--output_save is needed: the file to write (see --help)")
    if unknown:
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    if flags["layer_profile"] != "auto":
        existing_file(flags["layer_profile"], "layer profile")
    strategy = flags["strategy"] = parse_strategy(flags["strategy"])
    held = "layer_profile peft lora_r"
    rules = [
        NoEffect(f"output_save target_pair_count strategy batch_tokens reference unpair {held}", flags["check_data"],
                 "--check_data 1 writes nothing"),
        NoEffect(f"strategy batch_tokens {held}", not flags["reference"], "--reference 0 computes nothing"),
        NoEffect(held, not strategy.quantization, "no weight is quantized"),
        NoEffect("peft lora_r", flags["layer_profile"] != "auto", "the layer profile says what trains"),
        NoEffect("lora_r", not (flags["peft"] in ADAPTERS and ADAPTERS[flags["peft"]].splits_base),
                 f"--peft {flags['peft']} splits no weight before it is quantized"),
    ]
    return build(PrepareConfig, flags), notes(own.given(arguments), rules)
