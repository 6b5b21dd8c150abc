"""Tokenize preference pairs and cache the reference model's log-probabilities in a .save file; see --help."""

from collections.abc import Sequence

from src.cli.run import run


def main(arguments: Sequence[str]) -> None:
    from src.cli.prepare import parse

    config, notes = parse(arguments)
    from src.preference.prepare import prepare

    prepare(config, notes)


if __name__ == "__main__":
    run(main)
