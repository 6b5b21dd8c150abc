"""Everything reject generation is told: what each flag of rlhf_generate_reject_csv.py takes, its default and what it does."""

from dataclasses import dataclass

from src import values
from src.data.faults import SKIP_BAD_ROWS
from src.data.source import DATA_FORMATS
from src.model.strategy import HELP, STRATEGY, Strategy
from src.settings import NEEDED, flag, group

_ROWS = values.whole(1, 10**5)
_BATCH_SIZE = values.Reader(lambda text: None if text == "auto" else _ROWS(text), f"auto, or {_ROWS.takes}")
_STOP = values.Reader(lambda text: values.words(text).replace(r"\n", "\n"), "text")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. The defaults are those of this family's reject generation."""

    temperature: float = flag(values.number(1e-6, 1e6, or_zero=True), 1.0,
                              "of what top_p and top_k leave; 0: the likeliest token")
    top_p: float = flag(values.number(1e-6, 1), 0.3, "draw among the likeliest tokens that together are this probable")
    top_k: int = flag(values.not_negative, 0, "draw among this many tokens at most; 0: no limit")
    presence: float = flag(values.number(-1e6, 1e6), 0.0, "taken off the logit of each token that the answer has")
    frequency: float = flag(values.number(-1e6, 1e6), 1.0,
                            "taken off it for each time the answer has it; digits and spaces are not counted")
    penalty_decay: float = flag(values.number(1e-12, 1, or_zero=True), 0.996, "what these counts are multiplied by at each token")
    max_tokens: int = flag(values.whole(1, 10**6), 1000, "longest answer")
    stop: str = flag(_STOP, "\n\n",
                     "text that ends an answer and is no part of it, \\n for a line break; empty: none")
    ban_end_of_text: bool = flag(values.zero_or_one, True, "0: the model may end an answer by its end of text")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What the flags come to."""

    load_model: str = flag(values.input_file, NEEDED, "base checkpoint, the official .pth or .safetensors")
    input_csv: str = flag(values.input_file, NEEDED, f"prompts and chosen answers: {DATA_FORMATS}")
    skip_bad_rows: bool = flag(values.zero_or_one, False, SKIP_BAD_ROWS)
    output_csv: str = flag(values.output, NEEDED,
                           "CSV to write, or to continue; a .json of its name beside it says how it was made")
    strategy: Strategy = flag(STRATEGY, None, HELP)
    tokenizer: str | None = flag(values.tokenizer, None,
                                 "world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given (65536 "
                                 "world, 256 bytes)")
    overwrite: bool = flag(values.zero_or_one, False, "1: rows of --input_csv that have a reject get a new one too")
    seed: int = flag(values.seed, 0, "of the random numbers; each row draws its own, by seed and row number")
    batch_size: int | None = flag(_BATCH_SIZE, None,
                                  "rows written together, or auto: as many as half of the free memory has room for, at most "
                                  "128 on a CPU and 512 on a GPU; auto where not given")
    num_rejects: int = flag(values.whole(1, 1000), 1, "rejects for each prompt, each in a row of its own")
    avoid_equal: bool = flag(values.zero_or_one, False, "1: draw again, up to 20 times, where a reject equals the chosen answer")
    ctx_len: int = flag(values.positive, 4096,
                        "tokens that the model was trained on at once; longer prompts are reported, and read whole all the same")
    sampling: Sampling = group("sampling, as in the rwkv package")
