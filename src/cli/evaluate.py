"""The flags of evaluate.py."""

from collections.abc import Sequence

from src.cli.parser import DATA_FORMATS, SKIP_BAD_ROWS, NoEffect, Parser, notes
from src.cli.strategy import HELP, parse_strategy
from src.cli.values import output, path, positive, seed, strength, tokenizer, whole, zero_or_one
from src.evaluation.evaluate import DEFAULT_BETA, EvaluateConfig


def parser() -> Parser:
    parser = Parser("What a model, or a model with an adapter, prefers on a file of pairs: accuracy, margins, and how far the "
                    "length of the answers explains them. Nothing is trained.")
    add = parser.add_argument
    add("--load_model", type=path, required=True,
        help="checkpoint, .pth or .safetensors; with --adapter the base that it was trained on")
    add("--adapter", type=path, help="adapter file of train.py, put beside the base as in training")
    add("--pairs", type=path, required=True, help=f".save file, whose cached references give margins, or {DATA_FORMATS}")
    add("--skip_bad_rows", type=zero_or_one, default="0", help=SKIP_BAD_ROWS)
    add("--reference_model", type=path,
        help="with a CSV: checkpoint that margins are measured against; with --adapter its base, else none where not given")
    add("--output_json", type=output, help="file for the same numbers and more")
    add("--dpo_beta", type=strength, help=f"of margins and rewards; the adapter's, or {DEFAULT_BETA}, where not given")
    add("--strategy", help=f"{HELP}; precision and quantization should be those of the references")
    add("--rlhf_max_corpus_len", type=positive, default=4096,
        help="longest pair, in tokens: in a CSV longer prompts lose their beginning, in a .save longer pairs are left out")
    add("--tokenizer", type=tokenizer,
        help="with a CSV: world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given")
    add("--seed", type=seed, default=0, help="with a CSV: which template each pair gets, as in rlhf_dpo_generate_save.py")
    add("--batch_tokens", type=whole(1, 10**6), default=8192, help="most tokens in one forward pass")
    return parser


def parse(arguments: Sequence[str]) -> tuple[EvaluateConfig, tuple[str, ...]]:
    """The configuration, and lines on what the command says in vain.

    Raises UserError for a flag that is unknown or out of its range.
    """
    own = parser()
    flags = vars(own.parse_args(arguments))
    rules = [NoEffect("tokenizer seed skip_bad_rows", flags["pairs"].lower().endswith(".save"), "a .save holds tokens")]
    strategy = parse_strategy(flags.pop("strategy"))
    config = EvaluateConfig(**flags, device=strategy.device, precision=strategy.precision, dtype=strategy.dtype,
                            quantization=strategy.quantization)
    return config, notes(own.given(arguments), rules)
