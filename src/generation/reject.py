"""The job of rlhf_generate_reject_csv.py: the base model itself answers each prompt, and its answers become the rejects."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.checkpoint.base import load_base
from src.checkpoint.io import fingerprint
from src.errors import UserError
from src.generation.batch import generate
from src.generation.config import GenerateConfig
from src.generation.output import Output, open_output, write_summary
from src.model import RWKV, build_model
from src.preference.read import read_pairs
from src.preference.rows import Row
from src.preference.templates import format_prompt
from src.progress import progress_bar
from src.tokenizer import Tokenizer, load_tokenizer


def generate_rejects(config: GenerateConfig) -> None:
    """Write `config.output_csv`, going on where an earlier run stopped; what was done is told on stderr and in the sidecar.

    Raises:
        UserError: whatever the user can mend; the rows finished until then are saved.
    """
    rows = read_pairs(config.input_csv, require_reject=False)
    if Path(config.input_csv).resolve() == Path(config.output_csv).resolve():
        raise UserError(f"--output_csv {config.output_csv} is the input itself; choose another name")
    weights, dimensions = load_base(config.load_model)
    tokenizer = load_tokenizer(config.tokenizer, dimensions.vocab_size)
    settings = {
        "base_fingerprint": fingerprint(weights), "tokenizer": tokenizer.name, "precision": config.precision,
        "quantization": config.quantization, "seed": config.seed, "overwrite": config.overwrite, **asdict(config.sampling),
    }
    kept = [bool(row.reject.strip()) and not config.overwrite for row in rows]
    with open_output(config.output_csv, settings, rows, kept) as output:
        if output.done == len(rows):
            print(f"{config.output_csv}: complete with all its {len(rows)} rows; nothing to do", file=sys.stderr)
            return
        if output.done:
            print(f"{config.output_csv}: going on behind row {output.done} of {len(rows)}", file=sys.stderr)
        model = build_model(weights, dimensions, config.dtype, config.device, config.quantization)
        summary = _write_rows(config, model, tokenizer, rows, kept, output)
        write_summary(config.output_csv, settings, summary)
    stops = ", ".join(f"{count} by {reason}" for reason, count in summary["stop_reasons"].items())
    print(f"{config.output_csv}: complete; this run wrote {summary['rows_written']} rows, {summary['rows_kept']} of them with "
          f"the reject they had, and drew {summary['tokens']} tokens in {summary['seconds']:.1f} s "
          f"({summary['tokens_per_s']:.0f} tokens/s); mean length {summary['mean_tokens']:.1f} tokens; ended {stops or 'none'}",
          file=sys.stderr)


def _write_rows(config: GenerateConfig, model: RWKV, tokenizer: Tokenizer, rows: list[Row], kept: list[bool],
                output: Output) -> dict[str, Any]:
    """Answer what `output` lacks and append it in the rows' order, each row as soon as those before it are done."""
    started, first, tokens = time.monotonic(), output.done, 0
    reasons: Counter[str] = Counter()
    finished = {number: rows[number].reject for number in range(first, len(rows)) if kept[number]}

    def prompts() -> Iterator[tuple[int, list[int]]]:
        for number in range(first, len(rows)):
            if not kept[number]:
                yield number, tokenizer.encode(format_prompt(0, rows[number].prompt))

    with progress_bar("rows", len(rows), first) as advance:

        def tell(written: int) -> None:
            advance(written, f"({tokens / (time.monotonic() - started):.0f} tokens/s)")

        def on_tokens(drawn: int) -> None:
            nonlocal tokens
            tokens += drawn
            tell(0)

        def flush() -> None:
            ready = []
            while (number := output.done + len(ready)) in finished:
                ready.append(rows[number]._replace(reject=finished.pop(number)))
            if ready:
                output.append(ready)
                tell(len(ready))

        flush()
        for answer in generate(model, tokenizer, prompts(), config.sampling, config.seed, config.batch_size, on_tokens):
            finished[answer.row] = answer.text
            reasons[answer.reason] += 1
            flush()

    seconds, answered = time.monotonic() - started, reasons.total()
    return {"rows_written": len(rows) - first, "rows_kept": len(rows) - first - answered, "tokens": tokens,
            "mean_tokens": tokens / max(1, answered), "stop_reasons": dict(reasons), "seconds": seconds,
            "tokens_per_s": tokens / seconds}
