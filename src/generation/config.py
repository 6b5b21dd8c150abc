"""All settings of reject generation: what each flag of rlhf_generate_reject_csv.py takes, its default and what it does."""

from dataclasses import dataclass

from src import values
from src.data.faults import SKIP_BAD_ROWS
from src.data.source import DATA_FORMATS
from src.data.templates import LONGEST_STOPS, Ending
from src.errors import UserError
from src.quantization.strategy import HELP, STRATEGY, Strategy
from src.settings import NEEDED, RESOLVED, flag, group
from src.tokenizer.base import END_OF_TEXT

_ROWS = values.whole(1, 10**5)
_BATCH_SIZE = values.Reader(lambda text: None if text == "auto" else _ROWS(text), f"auto, or {_ROWS.takes}")
_STOP = values.Reader(lambda text: values.words(text).replace(r"\n", "\n"), "text")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn. The defaults are those of RWKV-LM-RLHF's reject generation."""

    temperature: float = flag(values.number(1e-6, 1e6, or_zero=True), 1.0,
                              "applied after top_p and top_k; 0: the likeliest token")
    top_p: float = flag(values.number(1e-6, 1), 0.3, "draw among the likeliest tokens that together have this probability")
    top_k: int = flag(values.not_negative, 0, "draw among at most this many tokens; 0: no limit")
    presence: float = flag(values.number(-1e6, 1e6), 0.0, "subtracted from the logit of each token that the answer has")
    frequency: float = flag(values.number(-1e6, 1e6), 1.0,
                            "subtracted from it once for each occurrence; digits and spaces are not counted")
    penalty_decay: float = flag(values.number(1e-12, 1, or_zero=True), 0.996, "factor on these counts at each token")
    max_tokens: int = flag(values.whole(1, 10**6), 1000, "longest answer")
    stop: tuple[str, ...] | None = flag(_STOP, None,
                                        "text that ends an answer and is not part of it, \\n for a line break; may be given "
                                        "several times; empty: none; if not given, the template's", repeats=True)
    ban_end_of_text: bool | None = flag(values.zero_or_one, None,
                                        "1: an answer can't end with the end-of-text token; 0: it can; if not given, as in the "
                                        "template")

    def resolved(self, ending: Ending) -> Ending:
        """A template's ending with what these settings say about it. Raises UserError if its stops are too long."""
        if self.stop is not None:
            ending = ending._replace(stops=tuple(stop for stop in dict.fromkeys(self.stop) if stop))
        if (length := sum(len(stop.encode("utf-8", "surrogateescape")) for stop in ending.stops)) > LONGEST_STOPS:
            raise UserError(f"--stop: its texts have {length} bytes together, of at most {LONGEST_STOPS}; "
                            "shorten them")
        if self.ban_end_of_text is None:
            return ending
        others = tuple(word for word in ending.controls if word != END_OF_TEXT)
        return ending._replace(controls=others if self.ban_end_of_text else (*others, END_OF_TEXT))


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """rlhf_generate_reject_csv.py's flags, resolved."""

    load_model: str = flag(values.input_file, NEEDED, "base checkpoint, the official .pth or .safetensors")
    input_csv: str = flag(values.input_file, NEEDED, f"prompts and chosen answers: {DATA_FORMATS}")
    skip_bad_rows: bool = flag(values.zero_or_one, False, SKIP_BAD_ROWS)
    output_csv: str = flag(values.output, NEEDED,
                           "CSV to write, or to continue; a .json of its name next to it says how it was made")
    template: str = flag(values.template, "classic", values.TEMPLATE)
    strategy: Strategy = flag(STRATEGY, RESOLVED, HELP)
    tokenizer: str | None = flag(values.tokenizer, None, values.TOKENIZER)
    overwrite: bool = flag(values.zero_or_one, False, "1: rows of --input_csv that have a reject get a new one too")
    seed: int = flag(values.seed, 0, "of the random numbers; each row has its own, by seed and row number")
    batch_size: int | None = flag(_BATCH_SIZE, None,
                                  "rows written together, or auto: as many as fit in half of the free memory, at most "
                                  "128 on a CPU and 512 on a GPU; if not given, auto")
    num_rejects: int = flag(values.whole(1, 1000), 1, "rejects for each prompt, each in a row of its own")
    avoid_equal: bool = flag(values.zero_or_one, False, "1: draw again, up to 20 times, if a reject equals the chosen answer")
    ctx_len: int = flag(values.positive, 4096,
                        "context length that the model was trained with; longer prompts are reported, and still read whole")
    sampling: Sampling = group("sampling, as in the rwkv package")
