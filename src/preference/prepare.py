"""From a file of preferences to a `.save` file: tokenize, compute the references (unless --reference 0), write."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.adapters.apply import how_quantized, quantized_linears
from src.adapters.tensors import settings_for
from src.checkpoint.base import load_base_and_fingerprint
from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.console import say
from src.data.check import check_pairs, print_check
from src.data.faults import Reading, refusal, report_notes, report_reading, skipped_rows, usable
from src.data.fit import fitted
from src.data.load_template import load_template, model_note, recorded, rejects_note
from src.data.ranking import pair_rule, rule_without_effect
from src.data.read import read_pairs
from src.data.rows import Row
from src.data.templates import Template
from src.data.token_lists import TokenPairs, digests_of
from src.data.tokenize import PairCounts, tokenize_pairs
from src.errors import UserError
from src.files import check_output
from src.kernels import recycle_memory
from src.model import build_model
from src.preference.config import PrepareConfig
from src.preference.journal import hold_journal, open_journal
from src.preference.kto import Mismatched, are_thumbs, mismatched_answers, unpaired
from src.preference.pairs import check_sidecar_place, save_pairs
from src.preference.reference import joined, reference_log_probs, to_score
from src.progress import progress_bar
from src.settings import input_files
from src.tokenizer import load_tokenizer


def prepare(config: PrepareConfig, notes: Sequence[str] = ()) -> None:
    """Write `config.output_save` and its sidecar, and summarize them on stderr. With `check_data` only report on the input.

    Meanwhile finished batches are in a `.partial` file next to it, from which an interrupted run resumes.

    Args:
        notes: lines about the command, printed on stderr once all checks have passed.

    Raises:
        UserError: an error that the user can fix; the output has not been written then.
    """
    if config.check_data:
        _check(config, notes)
        return
    assert config.output_save  # the flags were checked for it
    inputs = input_files(config)
    for path in (config.output_save, f"{config.output_save}.json", f"{config.output_save}.partial"):
        check_output(path, inputs)
    check_sidecar_place(config.output_save)
    with hold_journal(Path(f"{config.output_save}.partial")) as descriptor:
        _prepare(config, notes, descriptor)


def _prepare(config: PrepareConfig, notes: Sequence[str], held_file: int) -> None:
    assert config.load_model and config.output_save  # the flags were checked for both
    reading = read_pairs(config.input_csv, require_reject=True, rule=pair_rule(config.pairs, config.min_gap))
    usable(reading, config.skip_bad_rows)
    weights, dimensions, base = load_base_and_fingerprint(config.load_model)
    settings = settings_for(weights, config.layer_profile, config.peft, config.lora_r)
    tokenizer = load_tokenizer(config.tokenizer, dimensions.vocab_size)
    template = load_template(config.template, tokenizer)
    reading = fitted(reading, template, config.loss_on)
    rows = usable(reading, config.skip_bad_rows)
    pairs, counts = tokenize_pairs(rows, tokenizer, config.target_pair_count, config.rlhf_max_corpus_len, config.seed,
                                   reading.numbers, template, config.loss_on)
    row_of = np.fromiter(counts.rows, np.int64, len(counts.rows))
    if config.unpair:
        pairs, of = unpaired(pairs)
        row_of = row_of[of]
    mismatched = _mismatched(config, pairs, rows, row_of)
    held = how_quantized(settings, weights, config.strategy.quantization)

    def say_notes() -> None:
        report_reading(reading)
        counts.changes.report(config.input_csv, tokenizer.name)
        for note in (*notes, *_notes(config, reading, template)):
            say(note)

    sidecar = {
        "base_model": Path(config.load_model).name, "base_fingerprint": base, "version": dimensions.version,
        "tokenizer": tokenizer.name, "template": recorded(template), "loss_on": config.loss_on,
        "templates": counts.templates, "seed": config.seed,
        "max_len": config.rlhf_max_corpus_len, "cut": counts.cut, "dropped": counts.dropped,
        "changed_texts": counts.changes.texts, "skipped_rows": skipped_rows(reading), "references": config.reference,
        **(reading.facts or {}),
    }
    started = time.monotonic()
    journal_path = Path(f"{config.output_save}.partial")
    wanted = to_score(pairs, mismatched)
    if not config.reference:
        # The journal stays empty, but that of an interrupted run has to be kept or removed by the same rules.
        with open_journal(journal_path, held_file, _digest(["no references"], wanted)):
            say_notes()
            save_pairs(config.output_save, joined(pairs, mismatched, np.zeros((len(wanted), 2))), sidecar)
    else:
        if config.strategy.device.type == "cpu":
            recycle_memory()
        # The adapters of the later training start as the identity, so they don't change the references.
        model = build_model(weights, dimensions, config.strategy.dtype, config.strategy.device, config.strategy.quantization,
                            hold=quantized_linears(settings, config.strategy.quantization))
        digest = _digest([base, config.strategy.precision, held, config.batch_tokens], wanted)
        with open_journal(journal_path, held_file, digest) as journal:
            say_notes()
            if journal.done:
                say(f"{journal.path}: resuming after {len(journal.done)} finished batches")
            with progress_bar("pairs", len(wanted)) as advance:
                source = f"the checkpoint {config.load_model}"
                references = reference_log_probs(model, wanted, config.batch_tokens, advance, source, journal)
            save_pairs(config.output_save, joined(pairs, mismatched, references),
                       sidecar | {"precision": config.strategy.precision, **held})
    _say_what_was_made(config, reading.row_count(), pairs, counts, time.monotonic() - started)


def _mismatched(config: PrepareConfig, pairs: TokenPairs, rows: Sequence[Row], row_of: np.ndarray) -> Mismatched:
    """`mismatched_answers`, given the row of each pair; a UserError where there can be none."""
    prompts = np.zeros(len(pairs), np.int64)
    if are_thumbs(pairs).any():
        prompts = _prompt_numbers(rows)[row_of]
    try:
        return mismatched_answers(pairs, prompts, config.seed, config.rlhf_max_corpus_len)
    except ValueError:
        raise UserError(f"{config.input_csv}: all of its single answers are to one prompt, and KTO compares them with answers to "
                        "others; add some to another prompt, or remove them") from None


def _prompt_numbers(rows: Sequence[Row]) -> np.ndarray:
    """[n] int64: equal for equal prompts."""
    prompts = (row.prompt.encode(errors="surrogatepass") for row in rows)
    return np.unique(digests_of(prompts, "prompts compared", len(rows)), return_inverse=True)[1]


def _notes(config: PrepareConfig, reading: Reading, template: Template) -> list[str]:
    """Lines on what may not be meant: a template that does not fit the model or the rejects, flags without effect."""
    return [*model_note(config.load_model, recorded(template)), *rejects_note(config.input_csv, template),
            *rule_without_effect(reading, {"--pairs": config.pairs, "--min_gap": config.min_gap})]


def _digest(settings: list[Any], pairs: TokenPairs) -> str:
    """SHA-256 of settings and pairs."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    pairs.lists.add_to(digest)
    for column in pairs.columns():
        digest.update(column.tobytes())
    return digest.hexdigest()


def _say_what_was_made(config: PrepareConfig, n_rows: int, pairs: TokenPairs, counts: PairCounts, seconds: float) -> None:
    _, chosen, reject = pairs.lengths()
    up, down = int((reject == 0).sum()), int((chosen == 0).sum())
    kinds = ((len(pairs) - up - down, "pairs"), (up, "thumbs up"), (down, "thumbs down"))
    what = " and ".join(f"{number} {kind}" for number, kind in kinds if number)
    templates = ", ".join(f"{name} {count}" for name, count in counts.templates.items())
    say(f"{config.output_save}: {what} from {n_rows} rows in {seconds:.1f} s; "
        f"{counts.cut} prompts cut and {counts.dropped} pairs dropped at {config.rlhf_max_corpus_len} tokens; "
        f"{counts.equal} with equal answers; longest {counts.longest} tokens; templates {templates}"
        f"{'' if config.reference else '; no references'}")


def _check(config: PrepareConfig, notes: Sequence[str]) -> None:
    """Report what preparing would make of the file; UserError at the end if it would refuse it."""
    reading = read_pairs(config.input_csv, require_reject=True, rule=pair_rule(config.pairs, config.min_gap))
    # Reads only the shapes, not the values.
    vocab_size = read_dimensions(load_checkpoint(config.load_model), config.load_model).vocab_size if config.load_model else None
    tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    template = load_template(config.template, tokenizer)
    reading = fitted(reading, template, config.loss_on)
    usable(reading, skip_bad_rows=True)  # refuses a file without any
    report_notes(reading)
    for note in (*notes, *_notes(config, reading, template)):
        say(note)
    first_of_kind = {fault.kind: fault.message for fault in reversed(reading.faults)}
    found = check_pairs(reading, tokenizer, config.rlhf_max_corpus_len, config.seed, template, config.loss_on)
    print_check(config.input_csv, found, first_of_kind)
    if reading.faults and not config.skip_bad_rows:
        raise UserError(refusal(reading))
