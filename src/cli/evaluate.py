"""The flags of evaluate.py."""

from collections.abc import Sequence

from src.cli.parser import NoEffect, Parser, notes
from src.evaluation.config import EvaluateConfig
from src.quantization.strategy import parse_strategy
from src.settings import build


def parser() -> Parser:
    return Parser("What a model, or a model with an adapter, prefers on a file of pairs: accuracy, margins, and how far the "
                  "length of the answers explains them. Nothing is trained.", EvaluateConfig)


def parse(arguments: Sequence[str]) -> tuple[EvaluateConfig, tuple[str, ...]]:
    """The configuration, and lines on flags that have no effect.

    Raises UserError for a flag that is unknown or out of its range.
    """
    own = parser()
    flags = vars(own.parse_args(arguments))
    rules = [NoEffect("tokenizer seed skip_bad_rows list_pairs min_gap", flags["pairs"].lower().endswith(".save"),
                      "a .save holds tokens")]
    flags["strategy"] = parse_strategy(flags["strategy"])
    return build(EvaluateConfig, flags), notes(own.given(arguments), rules)
