"""All settings of a preparation: what each flag of rlhf_dpo_generate_save.py takes, its default and what it does."""

from dataclasses import dataclass

from src import values
from src.adapters.layer_profile import BLOCK_MODES
from src.data.faults import SKIP_BAD_ROWS
from src.data.ranking import MIN_GAP, RULES, WHICH_PAIRS
from src.data.source import DATA_FORMATS
from src.data.thinking import HELP_LOSS_ON, LOSS_ON
from src.preference.loss import without_reference
from src.quantization.strategy import HELP, STRATEGY, Strategy
from src.settings import NEEDED, RESOLVED, flag


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The flags, resolved. With check_data output_save may be None, and so may load_model if the tokenizer is named."""

    load_model: str | None = flag(values.input_file, None, "base checkpoint, the same that training will start from; required")
    input_csv: str = flag(values.input_file, NEEDED, f"preferences (docs/data.md): {DATA_FORMATS}")
    output_save: str | None = flag(values.output, None,
                                   ".save file to write; a .save.json next to it says how it was made; required")
    check_data: bool = flag(values.zero_or_one, False,
                            "1: only report what --input_csv holds, including all faulty rows (a table on stderr, JSON on"
                            " stdout), and write nothing; --output_save is not required then, nor is --load_model if "
                            "--tokenizer is given")
    skip_bad_rows: bool = flag(values.zero_or_one, False, SKIP_BAD_ROWS)
    pairs: str | None = flag(RULES, None, WHICH_PAIRS)
    min_gap: float | None = flag(values.weight, None, MIN_GAP)
    target_pair_count: int | None = flag(values.whole(1, 10**7), None,
        "pairs to make, repeating the rows as often as needed; if not given, every row once")
    template: str = flag(values.template, "classic", f"{values.TEMPLATE}; training and evaluation compare it")
    loss_on: str = flag(LOSS_ON, "all", HELP_LOSS_ON)
    strategy: Strategy = flag(STRATEGY, RESOLVED, f"{HELP}; precision and quantization must be those of the later training")
    rlhf_max_corpus_len: int = flag(values.positive, 4096,
                                    "longest pair, in tokens: a longer prompt loses its beginning, a pair whose answer alone is "
                                    "longer is dropped")
    tokenizer: str | None = flag(values.tokenizer, None, values.TOKENIZER)
    layer_profile: str = flag(values.layer_profile, "auto",
                              "with i8 or nf4 weights: the profile to train with, since fully trained weights stay unquantized "
                              "and PiSSA quantizes the remainder of its split")
    peft: str = flag(BLOCK_MODES, "lora", "with --layer_profile auto: as in the later training")
    lora_r: int = flag(values.positive, 16, "likewise")
    seed: int = flag(values.seed, 0, "which form of the template each pair gets")
    batch_tokens: int = flag(values.whole(1, 10**6), 8192, "most tokens in one forward pass")
    reference: bool = flag(values.zero_or_one, True,
                           "0: compute no references and store 0.0, for losses without a reference "
                           f"({', '.join(without_reference())})")
    unpair: bool = flag(values.zero_or_one, False,
                        "1: make each pair a thumb up and a thumb down, for --loss kto; single answers are thumbs anyway")
