"""The flags of rlhf_generate_reject_csv.py."""

from collections.abc import Sequence
from dataclasses import fields

from src.cli.run import DATA_FORMATS, SKIP_BAD_ROWS, Parser, not_negative, positive, seed, zero_or_one
from src.cli.strategy import HELP, parse_strategy
from src.errors import UserError
from src.generation.config import GenerateConfig, Sampling

DEFAULTS = Sampling()


def parser() -> Parser:
    parser = Parser("Let the base model write the rejected answers of a CSV of prompts and chosen answers. Run again after an "
                    "interruption, it continues where it stopped.")
    add = parser.add_argument
    add("--load_model", required=True, help="base checkpoint, the official .pth or .safetensors")
    add("--input_csv", required=True, help=f"prompts and chosen answers: {DATA_FORMATS}")
    add("--skip_bad_rows", type=zero_or_one, default="0", help=SKIP_BAD_ROWS)
    add("--output_csv", required=True, help="CSV to write, or to continue; a .json of its name beside it says how it was made")
    add("--strategy", help=HELP)
    add("--tokenizer", help="world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given (65536 world, "
                            "256 bytes)")
    add("--overwrite", type=zero_or_one, default="0", help="1: rows of --input_csv that have a reject get a new one too")
    add("--seed", type=seed, default=0, help="of the random numbers; each row draws its own, by seed and row number")
    add("--batch_size", type=positive_or_auto, default="auto", help="rows written together; auto: as many as memory has room "
                                                                    "for, up to where more is no faster")
    add("--num_rejects", type=positive, default=1, help="rejects for each prompt, each in a row of its own")
    add("--avoid_equal", type=zero_or_one, default="0", help="1: draw again where a reject equals the chosen answer")
    add("--ctx_len", type=positive, default=4096, help="tokens that the model was trained on at once; longer prompts are told, "
                                                       "and read whole all the same")

    draw = parser.add_argument_group("sampling, as in the rwkv package").add_argument
    draw("--temperature", type=float, default=DEFAULTS.temperature, help="of what top_p and top_k leave; 0: the likeliest token")
    draw("--top_p", type=float, default=DEFAULTS.top_p, help="draw among the likeliest tokens that together are this probable")
    draw("--top_k", type=not_negative, default=DEFAULTS.top_k, help="draw among this many tokens at most; 0: no limit")
    draw("--presence", type=float, default=DEFAULTS.presence, help="taken off the logit of each token that the answer has")
    draw("--frequency", type=float, default=DEFAULTS.frequency, help="taken off it for each time the answer has it; digits and "
                                                                     "spaces are not counted")
    draw("--penalty_decay", type=float, default=DEFAULTS.penalty_decay, help="what these counts are multiplied by at each token")
    draw("--max_tokens", type=positive, default=DEFAULTS.max_tokens, help="longest answer")
    draw("--stop", default=DEFAULTS.stop.replace("\n", r"\n"), help=r"text that ends an answer, \n for a line break; empty: none")
    draw("--ban_end_of_text", type=zero_or_one, default=str(int(DEFAULTS.ban_end_of_text)),
         help="0: the model may end an answer by its end of text")
    return parser


def positive_or_auto(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def parse(arguments: Sequence[str]) -> GenerateConfig:
    """The run's configuration. Raises UserError for a flag that is unknown or out of its range."""
    flags = vars(parser().parse_args(arguments))
    if not 0 < flags["top_p"] <= 1:
        raise UserError(f"--top_p must be over 0 and at most 1, not {flags['top_p']}")
    if not 0 <= flags["temperature"] < float("inf"):
        raise UserError(f"--temperature must be a finite number from 0 on, not {flags['temperature']}")
    if not 0 <= flags["penalty_decay"] <= 1:
        raise UserError(f"--penalty_decay must be in [0, 1], not {flags['penalty_decay']}")
    for name in ("presence", "frequency"):
        if not abs(flags[name]) < float("inf"):
            raise UserError(f"--{name} must be a finite number, not {flags[name]}")
    if flags["temperature"] == 0 and (flags["num_rejects"] > 1 or flags["avoid_equal"]):
        raise UserError("--temperature 0 answers a prompt one way only; --num_rejects and --avoid_equal need one above 0")
    flags["stop"] = flags["stop"].replace(r"\n", "\n")
    strategy = parse_strategy(flags.pop("strategy"))
    sampling = Sampling(**{field.name: flags.pop(field.name) for field in fields(Sampling)})
    return GenerateConfig(**flags, sampling=sampling, device=strategy.device, precision=strategy.precision, dtype=strategy.dtype,
                          quantization=strategy.quantization)
