"""Merge an adapter into its base model: an ordinary checkpoint that every RWKV runtime loads; see --help."""

from collections.abc import Sequence

from src.cli.run import run


def main(arguments: Sequence[str]) -> None:
    from src.adapters.merge import merge
    from src.cli.merge import parse

    merge(*parse(arguments))


if __name__ == "__main__":
    run(main)
