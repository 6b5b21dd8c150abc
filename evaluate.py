"""Preference accuracy, margins and length bias of a model, or a model with an adapter, on a file of pairs; see --help."""

from collections.abc import Sequence

from src.cli.evaluate import parse
from src.cli.run import run
from src.training.measure import measure


def main(arguments: Sequence[str]) -> None:
    measure(parse(arguments))


if __name__ == "__main__":
    run(main)
