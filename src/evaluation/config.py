"""Everything an evaluation is told: what each flag of evaluate.py takes, its default and what it does."""

from dataclasses import dataclass

from src import values
from src.data.faults import SKIP_BAD_ROWS
from src.data.source import DATA_FORMATS
from src.model.strategy import HELP, STRATEGY, Strategy
from src.settings import NEEDED, flag

DEFAULT_BETA = 0.01


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the flags come to."""

    load_model: str = flag(values.input_file, NEEDED,
                           "checkpoint, .pth or .safetensors; with --adapter the base that it was trained on")
    adapter: str | None = flag(values.input_file, None, "adapter file of train.py, put beside the base as in training")
    pairs: str = flag(values.input_file, NEEDED, f".save file, whose cached references give margins, or {DATA_FORMATS}")
    skip_bad_rows: bool = flag(values.zero_or_one, False, SKIP_BAD_ROWS)
    reference_model: str | None = flag(values.input_file, None,
                                       "with a CSV: checkpoint that margins are measured against; with --adapter its base, else"
                                       " none where not given")
    output_json: str | None = flag(values.output, None, "file for the same numbers and more")
    dpo_beta: float | None = flag(values.strength, None,
                                  f"of margins and rewards; the adapter's, or {DEFAULT_BETA}, where not given")
    strategy: Strategy = flag(STRATEGY, None, f"{HELP}; precision and quantization should be those of the references")
    rlhf_max_corpus_len: int = flag(values.positive, 4096,
                                    "longest pair, in tokens: in a CSV longer prompts lose their beginning, in a .save longer "
                                    "pairs are left out")
    tokenizer: str | None = flag(values.tokenizer, None,
                                 "with a CSV: world, bytes, or a tokenizer.json; by the checkpoint's vocabulary where not given")
    seed: int = flag(values.seed, 0, "with a CSV: which template each pair gets, as in rlhf_dpo_generate_save.py")
    batch_tokens: int = flag(values.whole(1, 10**6), 8192, "most tokens in one forward pass")
