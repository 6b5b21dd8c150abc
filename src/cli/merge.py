"""The flags of merge.py."""

from collections.abc import Sequence

from src.adapters.merge import MergeConfig
from src.cli.parser import Parser, notes
from src.settings import build


def parser() -> Parser:
    return Parser("Merge an adapter into the base model it was trained on, in the base's layout and precision.", MergeConfig)


def parse(arguments: Sequence[str]) -> tuple[MergeConfig, tuple[str, ...]]:
    """The configuration, and lines on flags that have no effect. Raises UserError for a wrong flag."""
    own = parser()
    flags = vars(own.parse_args(arguments))
    return build(MergeConfig, flags), notes(own.given(arguments), [])
