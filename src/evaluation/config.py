"""All settings of an evaluation: what each flag of evaluate.py takes, its default and what it does."""

from dataclasses import dataclass

from src import values
from src.data.faults import SKIP_BAD_ROWS
from src.data.ranking import MIN_GAP, RULES, WHICH_PAIRS
from src.data.source import DATA_FORMATS
from src.data.thinking import HELP_LOSS_ON, LOSS_ON
from src.quantization.strategy import HELP, STRATEGY, Strategy
from src.settings import NEEDED, RESOLVED, flag

DEFAULT_BETA = 0.01


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """evaluate.py's flags, resolved."""

    load_model: str = flag(values.input_file, NEEDED,
                           "checkpoint, .pth or .safetensors; with --adapter the base that it was trained on")
    adapter: str | None = flag(values.input_file, None, "adapter file of train.py, applied to the base as in training")
    pairs: str = flag(values.input_file, NEEDED, f".save file, whose cached references give margins, or {DATA_FORMATS}")
    skip_bad_rows: bool = flag(values.zero_or_one, False, SKIP_BAD_ROWS)
    list_pairs: str | None = flag(RULES, None, WHICH_PAIRS)
    min_gap: float | None = flag(values.weight, None, MIN_GAP)
    reference_model: str | None = flag(values.input_file, None,
                                       "with a CSV: checkpoint that margins are measured against; if not given, the base with"
                                       " --adapter, else none")
    output_json: str | None = flag(values.output, None, "file for the same numbers and more")
    dpo_beta: float | None = flag(values.strength, None,
                                  f"of margins and rewards; if not given, the adapter's, or {DEFAULT_BETA}")
    strategy: Strategy = flag(STRATEGY, RESOLVED, f"{HELP}; precision and quantization should be those of the references")
    rlhf_max_corpus_len: int = flag(values.positive, 4096,
                                    "longest pair, in tokens: in a CSV longer prompts lose their beginning, in a .save longer "
                                    "pairs are left out")
    tokenizer: str | None = flag(values.tokenizer, None,
                                 "with a CSV: world, bytes, or a tokenizer.json; if not given, determined by the checkpoint's "
                                 "vocabulary")
    seed: int = flag(values.seed, 0, "with a CSV: which form of the template each pair gets, as in rlhf_dpo_generate_save.py")
    template: str | None = flag(values.template, None,
                                f"with a CSV: {values.TEMPLATE}; if not given, the adapter's, or classic. A .save has its own, "
                                "which is compared with it")
    loss_on: str | None = flag(LOSS_ON, None,
                               f"with a CSV: {HELP_LOSS_ON}; if not given, the adapter's, or {LOSS_ON[0]}. "
                               "A .save has its own, which is compared with it")
    batch_tokens: int = flag(values.whole(1, 10**6), 8192, "most tokens in one forward pass")
