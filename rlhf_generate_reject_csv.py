"""Let the base model write the rejected answers of a CSV of prompts and chosen answers; see --help."""

from collections.abc import Sequence

from src.cli.run import run


def main(arguments: Sequence[str]) -> None:
    from src.cli.generate import parse

    config, notes = parse(arguments)
    from src.generation.reject import generate_rejects

    generate_rejects(config, notes)


if __name__ == "__main__":
    run(main)
