"""The flags of rlhf_generate_reject_csv.py."""

from collections.abc import Sequence
from dataclasses import fields

from src.cli.parser import DATA_FORMATS, SKIP_BAD_ROWS, NoEffect, Parser, notes
from src.cli.strategy import HELP, parse_strategy
from src.cli.values import not_negative, number, output, path, positive, seed, tokenizer, whole, words, zero_or_one
from src.errors import UserError
from src.generation.config import GenerateConfig, Sampling

DEFAULTS = Sampling()


def parser() -> Parser:
    parser = Parser("Let the base model write the rejected answers of a CSV of prompts and chosen answers. Run again after an "
                    "interruption, it continues where it stopped.")
    add = parser.add_argument
    add("--load_model", type=path, required=True, help="base checkpoint, the official .pth or .safetensors")
    add("--input_csv", type=path, required=True, help=f"prompts and chosen answers: {DATA_FORMATS}")
    add("--skip_bad_rows", type=zero_or_one, default="0", help=SKIP_BAD_ROWS)
    add("--output_csv", type=output, required=True,
        help="CSV to write, or to continue; a .json of its name beside it says how it was made")
    add("--strategy", help=HELP)
    add("--tokenizer", type=tokenizer,
        help="world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given (65536 world, 256 bytes)")
    add("--overwrite", type=zero_or_one, default="0", help="1: rows of --input_csv that have a reject get a new one too")
    add("--seed", type=seed, default=0, help="of the random numbers; each row draws its own, by seed and row number")
    add("--batch_size", type=positive_or_auto, default="auto", help="rows written together; auto: as many as memory has room "
                                                                    "for, up to where more is no faster")
    add("--num_rejects", type=whole(1, 1000), default=1, help="rejects for each prompt, each in a row of its own")
    add("--avoid_equal", type=zero_or_one, default="0", help="1: draw again where a reject equals the chosen answer")
    add("--ctx_len", type=positive, default=4096, help="tokens that the model was trained on at once; longer prompts are told, "
                                                       "and read whole all the same")

    draw = parser.add_argument_group("sampling, as in the rwkv package").add_argument
    draw("--temperature", type=number(1e-6, 1e6, or_zero=True), default=DEFAULTS.temperature,
         help="of what top_p and top_k leave; 0: the likeliest token")
    draw("--top_p", type=number(1e-6, 1), default=DEFAULTS.top_p,
         help="draw among the likeliest tokens that together are this probable")
    draw("--top_k", type=not_negative, default=DEFAULTS.top_k, help="draw among this many tokens at most; 0: no limit")
    draw("--presence", type=number(-1e6, 1e6), default=DEFAULTS.presence,
         help="taken off the logit of each token that the answer has")
    draw("--frequency", type=number(-1e6, 1e6), default=DEFAULTS.frequency,
         help="taken off it for each time the answer has it; digits and spaces are not counted")
    draw("--penalty_decay", type=number(1e-12, 1, or_zero=True), default=DEFAULTS.penalty_decay,
         help="what these counts are multiplied by at each token")
    draw("--max_tokens", type=whole(1, 10**6), default=DEFAULTS.max_tokens, help="longest answer")
    draw("--stop", type=words, default=DEFAULTS.stop.replace("\n", r"\n"),
         help=r"text that ends an answer, \n for a line break; empty: none")
    draw("--ban_end_of_text", type=zero_or_one, default=str(int(DEFAULTS.ban_end_of_text)),
         help="0: the model may end an answer by its end of text")
    return parser


def positive_or_auto(text: str) -> int | None:
    return None if text == "auto" else whole(1, 10**5)(text)


def parse(arguments: Sequence[str]) -> tuple[GenerateConfig, tuple[str, ...]]:
    """The run's configuration, and lines on what the command says in vain.

    Raises UserError for a flag that is unknown or out of its range.
    """
    own = parser()
    flags = vars(own.parse_args(arguments))
    if flags["temperature"] == 0 and (flags["num_rejects"] > 1 or flags["avoid_equal"]):
        raise UserError("--temperature 0 answers a prompt one way only; --num_rejects and --avoid_equal need one above 0")
    flags["stop"] = flags["stop"].replace(r"\n", "\n")
    rules = [
        NoEffect("top_p top_k seed", flags["temperature"] == 0, "--temperature 0 takes the likeliest token"),
        NoEffect("temperature top_p seed avoid_equal", flags["top_k"] == 1, "--top_k 1 leaves the likeliest token alone"),
        NoEffect("penalty_decay", flags["presence"] == flags["frequency"] == 0, "nothing is taken off for tokens that are there"),
    ]
    strategy = parse_strategy(flags.pop("strategy"))
    sampling = Sampling(**{field.name: flags.pop(field.name) for field in fields(Sampling)})
    config = GenerateConfig(**flags, sampling=sampling, device=strategy.device, precision=strategy.precision,
                            dtype=strategy.dtype, quantization=strategy.quantization)
    return config, notes(own.given(arguments), rules)
