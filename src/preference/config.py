"""Everything a preparation is told: what each flag of rlhf_dpo_generate_save.py takes, its default and what it does."""

from dataclasses import dataclass

from src import values
from src.adapters.layer_profile import BLOCK_MODES
from src.data.faults import SKIP_BAD_ROWS
from src.data.source import DATA_FORMATS
from src.model.strategy import HELP, STRATEGY, Strategy
from src.settings import NEEDED, flag


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What the flags come to. load_model may be None only with check_data, where the tokenizer is named; output_save likewise."""

    load_model: str | None = flag(values.input_file, None, "base checkpoint, the very one that training will start from; needed")
    input_csv: str = flag(values.input_file, NEEDED, f"prompts with chosen and rejected answers: {DATA_FORMATS}")
    output_save: str | None = flag(values.output, None,
                                   ".save file to write; a .save.json beside it says how it was made; needed")
    check_data: bool = flag(values.zero_or_one, False,
                            "1: only report what --input_csv holds, all of its faulty rows included (a table on stderr, JSON on"
                            " stdout), and write nothing; --output_save is not needed then, nor is --load_model where "
                            "--tokenizer is given")
    skip_bad_rows: bool = flag(values.zero_or_one, False, SKIP_BAD_ROWS)
    target_pair_count: int | None = flag(values.whole(1, 10**7), None,
        "pairs to make, walking the rows round and round; every row once where not given")
    strategy: Strategy = flag(STRATEGY, None, f"{HELP}; precision and quantization must be those of the training to come")
    rlhf_max_corpus_len: int = flag(values.positive, 4096,
                                    "longest pair, in tokens: a longer prompt loses its beginning, an answer longer by itself "
                                    "drops the pair")
    tokenizer: str | None = flag(values.tokenizer, None,
                                 "world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given (65536 "
                                 "world, 256 bytes)")
    layer_profile: str = flag(values.layer_profile, "auto",
                              "with i8 or nf4 weights: the profile to train with, since what trains in full stays unquantized "
                              "and PiSSA quantizes what its split leaves")
    peft: str = flag(BLOCK_MODES, "lora", "with --layer_profile auto: as in the training to come")
    lora_r: int = flag(values.positive, 16, "likewise")
    seed: int = flag(values.seed, 0, "which template each pair gets")
    batch_tokens: int = flag(values.whole(1, 10**6), 8192, "most tokens in one forward pass")
    reference: bool = flag(values.zero_or_one, True,
                           "0: compute none and store 0.0, for the losses that have no reference (simpo, orpo, cpo)")
