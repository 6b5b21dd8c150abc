"""Preference accuracy, margins and length bias of a model, or a model with an adapter, on a file of pairs; see --help."""

from collections.abc import Sequence

from src.cli.run import check_ranks, run


def main(arguments: Sequence[str]) -> None:
    check_ranks()
    from src.cli.evaluate import parse

    config, notes = parse(arguments)
    from src.evaluation.evaluate import evaluate

    evaluate(config, notes)


if __name__ == "__main__":
    run(main)
