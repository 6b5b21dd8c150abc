"""The job of rlhf_generate_reject_csv.py: the base model answers each prompt, and its answers become the rejects."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from src.checkpoint.base import load_base_and_fingerprint
from src.console import say
from src.data.faults import Reading, report_reading, skipped_rows, usable
from src.data.fit import fitted
from src.data.load_template import load_template, model_note, recorded
from src.data.read import read_pairs
from src.data.rows import Row
from src.data.templates import Ending, Template, prompt_pieces
from src.data.token_lists import TokenLists
from src.data.tokenize import encode_pieces
from src.files import check_output, named_file, sha256
from src.generation.batch import Answer, generate
from src.generation.config import GenerateConfig
from src.generation.memory import rows_that_fit
from src.generation.output import Output, open_output, write_summary
from src.generation.plan import Plan
from src.generation.requests import Request
from src.model import build_model
from src.model.decode import Forward, Kernels, decoder_for
from src.progress import bar_if_long, progress_bar
from src.settings import input_files
from src.tokenizer import Tokenizer, load_tokenizer
from src.tokenizer.base import END_OF_TEXT
from src.tokenizer.fidelity import Encoder

AT_ONCE = 1000  # rows in a write, which waits until they are on disk


def generate_rejects(config: GenerateConfig, notes: Sequence[str] = ()) -> None:
    """Write `config.output_csv`, continuing where an earlier run stopped; a summary is on stderr and in the sidecar.

    Args:
        notes: lines about the command, printed on stderr once all checks have passed.

    Raises:
        UserError: an error that the user can fix; the rows finished before it are saved.
    """
    inputs = input_files(config)
    for path in (config.output_csv, f"{config.output_csv}.json"):
        check_output(path, inputs)
    reading = read_pairs(config.input_csv, require_reject=False)
    usable(reading, config.skip_bad_rows)
    weights, dimensions, base = load_base_and_fingerprint(config.load_model)
    tokenizer = load_tokenizer(config.tokenizer, dimensions.vocab_size)
    template = load_template(config.template, tokenizer)
    # Notes on answers are those of preparation: here they stay as they are.
    reading = fitted(reading, template)._replace(notes=reading.notes)
    usable(reading, config.skip_bad_rows)
    ending = config.sampling.resolved(template.ending)
    settings = {
        "base_fingerprint": base, "tokenizer": tokenizer.name, "template": recorded(template),
        "precision": config.strategy.precision,
        **({"tokenizer_sha256": sha256(file)} if (file := named_file("tokenizer", tokenizer.name)) else {}),
        "quantization": config.strategy.quantization, "seed": config.seed, "overwrite": config.overwrite,
        "num_rejects": config.num_rejects, "avoid_equal": config.avoid_equal, **asdict(config.sampling),
        "stop": list(ending.stops), "ban_end_of_text": END_OF_TEXT not in ending.controls,
        **({"skipped_rows": skipped_rows(reading)} if reading.faults else {}),
    }
    plan = Plan(reading, config.num_rejects, config.overwrite)
    with open_output(config.output_csv, settings, plan.known()) as output:
        report_reading(reading)
        for note in (*notes, *model_note(config.load_model, recorded(template))):
            say(note)
        if output.done == len(plan):
            say(f"{config.output_csv}: complete with all its {len(plan)} rows; nothing to do")
            return
        if output.done:
            say(f"{config.output_csv}: continuing after row {output.done} of {len(plan)}")
        if plan.kept.all():
            say("note: every row has a reject already, so nothing is drawn and no sampling flag has an effect; --overwrite 1 "
                "draws new ones")
        requests = plan.requests(output.done, _prompts(config, tokenizer, template, reading, plan.to_answer(output.done)))
        model = build_model(weights, dimensions, config.strategy.dtype, config.strategy.device, config.strategy.quantization,
                            quantize_head=config.strategy.quantization == "int8")
        del weights
        summary = _write_rows(config, decoder_for(model), tokenizer, ending, plan, requests, output)
        write_summary(config.output_csv, settings, summary)
    stops = ", ".join(f"{count} by {reason}" for reason, count in summary["stop_reasons"].items())
    equal = f"; {summary['equal_to_chosen']} equal the chosen answer" if summary["equal_to_chosen"] else ""
    say(f"{config.output_csv}: complete; this run wrote {summary['rows_written']} rows, {summary['rows_kept']} of them "
        f"skipped, with the reject they had, and drew {summary['tokens']} tokens in {summary['seconds']:.1f} s "
        f"({summary['tokens_per_s']:.0f} tokens/s); mean length {summary['mean_tokens']:.1f} tokens; "
        f"ended {stops or 'none'}{equal}")


def _prompts(config: GenerateConfig, tokenizer: Tokenizer, template: Template, reading: Reading, rows: np.ndarray) -> TokenLists:
    """The prompts of the rows with these indices; reports those over `ctx_len` tokens, and those that the tokenizer changes."""
    prompts, encoder = TokenLists(tokenizer.vocab_size), Encoder(tokenizer)
    with bar_if_long("prompts to tokens", len(rows)) as advance:
        for row in rows.tolist():
            pieces = prompt_pieces(template, reading.rows[row].prompt)
            prompts.append(encode_pieces(pieces, encoder, reading.numbers[row], "prompt"))
            advance(1)
    encoder.changes().report(config.input_csv, tokenizer.name)
    lengths = prompts.lengths()
    long = np.flatnonzero(lengths > config.ctx_len)
    if len(long):
        say(f"{len(long)} prompts are longer than --ctx_len {config.ctx_len}, the longest with {lengths.max()} tokens (the first "
            f"is row {reading.numbers[int(rows[long[0]])]}); they are read whole, and answered as well as the model can")
    return prompts


def _write_rows(config: GenerateConfig, engine: Forward | Kernels, tokenizer: Tokenizer, ending: Ending, plan: Plan,
                requests: Sequence[Request], output: Output) -> dict[str, Any]:
    """Write the rows that `output` lacks, in their order, each as soon as those before it are done."""
    started, first, tokens, equal = time.monotonic(), output.done, 0, 0
    length = 0  # of all answers together
    reasons: Counter[str] = Counter()
    finished: dict[tuple[int, int], str] = {}  # answers to rows that others stand before
    batch_size = config.batch_size or rows_that_fit(engine.dimensions, config.sampling, config.strategy.device)

    def refuse(answer: Answer) -> bool:
        return config.avoid_equal and answer.text == ending.kept(plan.rows[answer.row].chosen)

    with progress_bar("rows", len(plan), first) as advance:

        def show(written: int) -> None:
            advance(written, f"({tokens / (time.monotonic() - started):.0f} tokens/s)")

        def on_tokens(drawn: int) -> None:
            nonlocal tokens
            tokens += drawn
            show(0)

        def ready() -> Iterator[Row]:
            for at in range(output.done, len(plan)):
                place = row, _ = plan.place(at)
                if not plan.kept[row] and place not in finished:
                    return
                yield plan.rows[row] if plan.kept[row] else plan.rows[row]._replace(reject=finished.pop(place))

        def flush() -> None:
            while rows := list(islice(ready(), AT_ONCE)):
                output.append(rows)
                show(len(rows))

        flush()
        for answer in generate(engine, tokenizer, requests, config.sampling, config.seed, batch_size, on_tokens, refuse,
                               ending):
            finished[answer.row, answer.sample] = answer.text
            reasons[answer.reason] += 1
            length += len(answer.tokens)
            equal += answer.refused
            flush()

    seconds, answered = time.monotonic() - started, sum(reasons.values())
    return {"rows_written": len(plan) - first, "rows_kept": len(plan) - first - answered, "tokens": tokens,
            "mean_tokens": length / max(1, answered), "stop_reasons": dict(reasons), "equal_to_chosen": equal,
            "batch_size": batch_size, "seconds": seconds, "tokens_per_s": tokens / seconds}
