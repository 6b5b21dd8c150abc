"""The flags of rlhf_generate_reject_csv.py."""

from collections.abc import Sequence

from src.cli.parser import NoEffect, Parser, notes
from src.errors import UserError
from src.generation.config import GenerateConfig
from src.quantization.strategy import parse_strategy
from src.settings import build


def parser() -> Parser:
    return Parser("Let the base model write the rejected answers of a CSV of prompts and chosen answers. Run again after an "
                  "interruption, it continues where it stopped.", GenerateConfig)


def parse(arguments: Sequence[str]) -> tuple[GenerateConfig, tuple[str, ...]]:
    """The run's configuration, and lines on flags that have no effect.

    Raises UserError for a flag that is unknown or out of its range.
    """
    own = parser()
    flags = vars(own.parse_args(arguments))
    if flags["temperature"] == 0 and (flags["num_rejects"] > 1 or flags["avoid_equal"]):
        raise UserError("--temperature 0 answers a prompt one way only; take one above 0 for --num_rejects or --avoid_equal")
    rules = [
        NoEffect("top_p top_k seed", flags["temperature"] == 0, "--temperature 0 takes the likeliest token"),
        NoEffect("temperature top_p seed avoid_equal", flags["top_k"] == 1, "--top_k 1 leaves only the likeliest token"),
        NoEffect("penalty_decay", flags["presence"] == flags["frequency"] == 0, "repeated tokens have no penalty"),
    ]
    flags["strategy"] = parse_strategy(flags["strategy"])
    return build(GenerateConfig, flags), notes(own.given(arguments), rules)
