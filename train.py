"""DPO plus a share of SFT on a v6 or v7 model, through adapters on a plain or quantized base; see --help."""

from collections.abc import Sequence

from src.cli.run import check_ranks, run


def main(arguments: Sequence[str]) -> None:
    from src.training.following import follow_starter

    follow_starter()  # before the imports, which take seconds
    check_ranks()
    from src.cli.train import parse

    config, expected, notes = parse(arguments)
    # Lightning takes seconds to import; a wrong flag should fail before that.
    from src.generation.greedy import likeliest_answers
    from src.training.run import train

    train(config, expected, likeliest_answers, notes)


if __name__ == "__main__":
    run(main)
