"""The flags of rlhf_dpo_generate_save.py."""

from collections.abc import Sequence

from src.adapters.layer_profile import BLOCK_MODES
from src.adapters.modes import ADAPTERS
from src.cli.parser import DATA_FORMATS, SKIP_BAD_ROWS, NoEffect, Parser, notes
from src.cli.strategy import HELP, parse_strategy
from src.cli.values import output, path, positive, seed, tokenizer, whole, zero_or_one
from src.errors import UserError
from src.files import existing_file
from src.preference.config import PrepareConfig


def parser() -> Parser:
    parser = Parser("Tokenize preference pairs and cache the base model's log-probabilities of their answers.")
    add = parser.add_argument
    add("--load_model", type=path, help="base checkpoint, the very one that training will start from; needed")
    add("--input_csv", type=path, required=True, help=f"prompts with chosen and rejected answers: {DATA_FORMATS}")
    add("--output_save", type=output, help=".save file to write; a .save.json beside it says how it was made; needed")
    add("--check_data", type=zero_or_one, default="0",
        help="1: only report what --input_csv holds, all of its faulty rows included (a table on stderr, JSON on stdout), and "
             "write nothing; --output_save is not needed then, nor is --load_model where --tokenizer is given")
    add("--skip_bad_rows", type=zero_or_one, default="0", help=SKIP_BAD_ROWS)
    add("--target_pair_count", type=whole(1, 10**7),
        help="pairs to make, walking the rows round and round; every row once where not given")
    add("--strategy", help=f"{HELP}; precision and quantization must be those of the training to come")
    add("--rlhf_max_corpus_len", type=positive, default=4096,
        help="longest pair, in tokens: a longer prompt loses its beginning, an answer longer by itself drops the pair")
    add("--tokenizer", type=tokenizer,
        help="world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given (65536 world, 256 bytes)")
    add("--layer_profile", type=path, default="auto",
        help="with i8 or nf4 weights: the profile to train with, since what trains in full stays unquantized and PiSSA quantizes "
             "what its split leaves")
    add("--peft", choices=BLOCK_MODES, default="lora", help="with --layer_profile auto: as in the training to come")
    add("--lora_r", type=positive, default=16, help="likewise")
    add("--seed", type=seed, default=0, help="which template each pair gets")
    add("--batch_tokens", type=whole(1, 10**6), default=8192, help="most tokens in one forward pass")
    add("--reference", type=zero_or_one, default="1",
        help="0: compute none and store 0.0, for the losses that have no reference (simpo, orpo, cpo)")
    return parser


def parse(arguments: Sequence[str]) -> tuple[PrepareConfig, tuple[str, ...]]:
    """The configuration, and lines on what the command says in vain.

    Raises UserError for a flag that is unknown, lacking or out of its range.
    """
    own = parser()
    known, unknown = own.parse_known_args(arguments)
    flags = vars(known)
    if not flags["load_model"] and not (flags["check_data"] and flags["tokenizer"]):
        raise UserError("--load_model is needed: the base checkpoint (see --help)")
    if not flags["output_save"] and not flags["check_data"]:
        raise UserError("--output_save is needed: the file to write (see --help)")
    if unknown:
        own.error(f"unrecognized arguments: {' '.join(unknown)}")
    if flags["layer_profile"] != "auto":
        existing_file(flags["layer_profile"], "layer profile")
    strategy = parse_strategy(flags.pop("strategy"))
    held = "layer_profile peft lora_r"
    rules = [
        NoEffect(f"output_save target_pair_count strategy batch_tokens reference {held}", flags["check_data"],
                 "--check_data 1 makes nothing"),
        NoEffect(f"strategy batch_tokens {held}", not flags["reference"], "--reference 0 computes nothing"),
        NoEffect(held, not strategy.quantization, "no weight is quantized"),
        NoEffect("peft lora_r", flags["layer_profile"] != "auto", "the layer profile says what trains"),
        NoEffect("lora_r", not (flags["peft"] in ADAPTERS and ADAPTERS[flags["peft"]].splits_base),
                 f"--peft {flags['peft']} splits no weight before it is quantized"),
    ]
    config = PrepareConfig(**flags, device=strategy.device, precision=strategy.precision, dtype=strategy.dtype,
                           quantization=strategy.quantization)
    return config, notes(own.given(arguments), rules)
