"""evaluate.py's work: measure what a model, with or without an adapter, prefers on a file of pairs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from src.adapters.apply import apply_layer_profile, how_quantized, quantized_linears
from src.adapters.files import Adapter, check_adapter, load_adapter, read_adapter
from src.adapters.layer_profile import auto_layer_profile
from src.checkpoint.base import load_base, load_base_and_fingerprint
from src.checkpoint.dimensions import Dimensions
from src.console import printable, say, show
from src.data.faults import report_reading, skipped_rows, usable
from src.data.fit import fitted
from src.data.load_template import (
    adapter_notes,
    check_loss_on,
    check_template,
    load_template,
    loss_on_in,
    loss_on_of_adapter,
    model_note,
    recorded,
    recorded_in,
    recorded_in_adapter,
    template_of_adapter,
)
from src.data.ranking import pair_rule, rule_without_effect
from src.data.read import read_pairs
from src.data.token_lists import TokenPairs
from src.data.tokenize import tokenize_pairs
from src.errors import UserError
from src.evaluation.config import DEFAULT_BETA, EvaluateConfig
from src.evaluation.measures import preference_measures
from src.files import atomic_write, check_output, json_text
from src.kernels import recycle_memory
from src.model import RWKV, build_model
from src.numbers import STRENGTH
from src.preference.loss import LOSSES, needs_reference
from src.preference.pairs import check_sidecar, has_references, load_pairs
from src.preference.reference import reference_log_probs
from src.progress import progress_bar
from src.settings import input_files
from src.tokenizer import load_tokenizer


def evaluate(config: EvaluateConfig, notes: Sequence[str] = ()) -> None:
    """Print the tables, and write the same numbers to `config.output_json` if given.

    Args:
        notes: lines about the command, printed on stderr once all checks have passed.

    Raises:
        UserError: an error that the user can fix; nothing has been written then.
    """
    if config.output_json:
        check_output(config.output_json, input_files(config))
    weights, dimensions, base = load_base_and_fingerprint(config.load_model)
    adapter = read_adapter(config.adapter) if config.adapter else None
    if adapter is not None:
        check_adapter(adapter, weights, base)
    beta = config.dpo_beta or _beta_of(adapter)
    settings = adapter.settings if adapter is not None else auto_layer_profile(dimensions.n_layer, 0.0, 0.0)
    made_with = {"precision": config.strategy.precision, **how_quantized(settings, weights, config.strategy.quantization)}
    pairs, references, facts = _pairs(config, dimensions, base, made_with, adapter)

    for note in notes:
        say(note)
    if config.dpo_beta is not None and references is None and not (config.reference_model or adapter):
        say("note: no effect: --dpo_beta (without references there are no margins)")
    if config.strategy.device.type == "cpu":
        recycle_memory()
    if references is None and config.reference_model:
        references = _log_probs(_reference_model(config, config.reference_model, dimensions), pairs, config, "reference",
                                f"the reference model {config.reference_model}")
        facts["references"] = config.reference_model
    model = build_model(weights, dimensions, config.strategy.dtype, config.strategy.device, config.strategy.quantization,
                        hold=quantized_linears(settings, config.strategy.quantization))
    del weights
    if references is None and adapter is not None:
        references = _log_probs(model, pairs, config, "reference", f"the checkpoint {config.load_model}")
        facts["references"] = config.load_model
    if adapter is not None:
        apply_layer_profile(model, settings, seed=0)
        load_adapter(model, adapter, base)

    (_, *lengths), (*_, chosen_from, reject_from) = pairs.lengths(), pairs.columns()
    tokens = np.stack(lengths, axis=1) - np.stack([chosen_from, reject_from], axis=1)
    source = f"the adapter {config.adapter} on {config.load_model}" if adapter else f"the checkpoint {config.load_model}"
    numbers = preference_measures(_log_probs(model, pairs, config, "pairs", source), references, tokens, beta)
    if config.output_json:
        report = {"model": config.load_model, "base_fingerprint": base, "adapter": config.adapter, "pairs_file": config.pairs,
                  **facts, "dpo_beta": beta, **made_with, **numbers}
        text = json_text(report, config.output_json, indent=2)
        with atomic_write(config.output_json, "w", encoding="utf-8") as file:
            file.write(text)
    for table in tables(numbers, beta, facts["references"]):
        show(table)


def tables(numbers: dict[str, Any], beta: float, references: str | None) -> list[Table]:
    """The numbers of `preference_measures` as tables to print."""
    main = Table("", f"{numbers['pairs']} pairs")
    for name, words, form in (
            ("accuracy", "preference accuracy (margin > 0)", "{:.1%}"), ("margin", f"mean margin, beta {beta:g}", "{:+.4f}"),
            ("margin_std", "its standard deviation", "{:.4f}"), ("margin_median", "median margin", "{:+.4f}"),
            ("reward_chosen", "reward, chosen", "{:+.4f}"), ("reward_rejected", "reward, rejected", "{:+.4f}"),
            ("policy_accuracy", "the model itself finds the chosen answer likelier", "{:.1%}"),
            ("policy_accuracy_per_token", "likelier by the mean of its tokens", "{:.1%}"),
            ("log_prob_chosen", "log-probability, chosen (nats)", "{:.2f}"),
            ("log_prob_reject", "log-probability, rejected (nats)", "{:.2f}"),
            ("nats_per_token_chosen", "nats a token, chosen", "{:.4f}"),
            ("nats_per_token_reject", "nats a token, rejected", "{:.4f}")):
        main.add_row(words, _shown(numbers[name], form))
    main.add_row("references", printable(references or "none, so no margins"))

    bias = Table("length", "pairs", "accuracy", "likelier", "likelier, per token")
    for name, words in (("chosen_longer", "chosen longer"), ("chosen_shorter", "chosen shorter"), ("same_length", "same length")):
        group = numbers["by_length"][name]
        accuracies = (group[what] for what in ("accuracy", "policy_accuracy", "policy_accuracy_per_token"))
        bias.add_row(words, str(group["pairs"]), *(_shown(value, "{:.1%}") for value in accuracies))
    correlation = numbers["length_correlation"]
    bias.add_row("correlation with length", "", *(_shown(correlation[what], "{:+.3f}") for what in (
        "margin", "log_prob_difference", "log_prob_difference_per_token")))
    bias.caption = f"mean length: chosen {numbers['tokens_chosen']:.1f} tokens, rejected {numbers['tokens_reject']:.1f}"
    return [main, bias]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _pairs(config: EvaluateConfig, dimensions: Dimensions, base: str,
           made_with: dict[str, Any], adapter: Adapter | None) -> tuple[TokenPairs, np.ndarray | None, dict[str, Any]]:
    """The pairs, their cached references if the file has them, and facts on both for the report."""
    trained = recorded_in_adapter(adapter.extra, adapter.path) if adapter else {}
    if config.pairs.lower().endswith(".save"):
        return _prepared_pairs(config, dimensions, base, made_with, trained)
    pairs, facts = _pairs_of_texts(config, dimensions, trained)
    return pairs, None, facts


def _pairs_of_texts(config: EvaluateConfig, dimensions: Dimensions,
                    trained: dict[str, Any]) -> tuple[TokenPairs, dict[str, Any]]:
    """`trained`: what the adapter records of its training data."""
    path = config.pairs
    reading = read_pairs(path, require_reject=True, rule=pair_rule(config.list_pairs, config.min_gap))
    if "thumbs" in (reading.facts or {}):
        raise UserError(f"{path}: holds single answers with a thumb, of which nothing here is measured; give pairs, or prepare "
                        "it with rlhf_dpo_generate_save.py as --eval_file of train.py --loss kto, which measures them")
    tokenizer = load_tokenizer(config.tokenizer, dimensions.vocab_size)
    template = load_template(config.template or template_of_adapter(config.adapter, trained), tokenizer)
    loss_on = config.loss_on or loss_on_of_adapter(config.adapter, trained)
    reading = fitted(reading, template, loss_on)
    rows = usable(reading, config.skip_bad_rows)
    pairs, report = tokenize_pairs(rows, tokenizer, None, config.rlhf_max_corpus_len, config.seed, reading.numbers, template,
                                   loss_on)
    report_reading(reading)
    used = recorded(template)
    for note in (*model_note(config.load_model, used), *adapter_notes(config.adapter, trained, used, loss_on),
                 *rule_without_effect(reading, {"--list_pairs": config.list_pairs, "--min_gap": config.min_gap})):
        say(note)
    report.changes.report(path, tokenizer.name)
    return pairs, {"references": None, "tokenizer": tokenizer.name, "template": used, "loss_on": loss_on,
                   "cut": report.cut, "left_out": report.dropped, "changed_texts": report.changes.texts,
                   "skipped_rows": skipped_rows(reading), **(reading.facts or {})}


def _prepared_pairs(config: EvaluateConfig, dimensions: Dimensions, base: str, made_with: dict[str, Any],
                    trained: dict[str, Any]) -> tuple[TokenPairs, np.ndarray | None, dict[str, Any]]:
    path = config.pairs
    loaded, sidecar, left_out = load_pairs(path, dimensions.vocab_size, config.rlhf_max_corpus_len)
    template, loss_on = recorded_in(sidecar), loss_on_in(sidecar)
    tokenizer = sidecar.get("tokenizer") if sidecar else None
    facts: dict[str, Any] = {"references": None, "tokenizer": tokenizer, "template": template, "loss_on": loss_on,
                             "left_out": sum(left_out.values())}
    check_template(config.template, template, path)
    check_loss_on(config.loss_on, loss_on, path)
    for note in (*model_note(config.load_model, template), *adapter_notes(config.adapter, trained, template, loss_on)):
        say(note)
    pairs = loaded.tokens
    if not has_references(loaded, sidecar):
        return pairs, None, facts
    if config.reference_model:
        raise UserError(f"--reference_model: {path} has references of its own; leave the flag out, or give the CSV")
    # A merged model on its base's references is the purpose; other differences disturb the margins.
    if sidecar is None:
        say(f"warning: {path} has no {Path(path).name}.json next to it, so the origin of its references can't be checked")
    for differing in check_sidecar(sidecar, made_with) if sidecar is not None else []:
        say(f"warning: {path}: {differing}; margins include the rounding difference")
    name = sidecar.get("base_model", "unnamed") if sidecar is not None else "unknown"
    facts["references"] = f"cached, of {name}"
    facts["references_of_this_model"] = None if sidecar is None else sidecar.get("base_fingerprint") == base
    return pairs, loaded.references()[:, :2], facts


def _reference_model(config: EvaluateConfig, path: str, dimensions: Dimensions) -> RWKV:
    weights, found = load_base(path)
    if found.vocab_size != dimensions.vocab_size:
        raise UserError(f"--reference_model {path} has a vocabulary of {found.vocab_size}, {config.load_model} one of "
                        f"{dimensions.vocab_size}; give a model that reads the same tokens")
    return build_model(weights, found, config.strategy.dtype, config.strategy.device, config.strategy.quantization)


def _log_probs(model: RWKV, pairs: TokenPairs, config: EvaluateConfig, what: str, source: str) -> np.ndarray:
    """[n, 2]: sums over the chosen and the rejected answers, nats; raises NotFinite, naming `source`, if one is not finite."""
    with progress_bar(what, len(pairs)) as advance:
        return reference_log_probs(model, pairs, config.batch_tokens, advance, source)


def _beta_of(adapter: Adapter | None) -> float:
    """The beta of the loss that the adapter was trained with; UserError if the file has something else there.

    Losses without a reference have none for these margins, nor has `--sft 1`.
    """
    if adapter is None:
        return DEFAULT_BETA
    loss = adapter.extra.get("loss", "dpo")
    name = LOSSES[loss].settings["beta"].name if isinstance(loss, str) and loss in LOSSES and needs_reference(loss) else None
    if name is None or (beta := adapter.extra.get(name)) is None:
        return DEFAULT_BETA
    least, most = STRENGTH  # the range of --dpo_beta
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not least <= beta <= most:
        raise UserError(f"{adapter.path}: its {name} is {json.dumps(beta)[:60]}, not a number from {least:g} to {most:g}; "
                        "give it with --dpo_beta")
    return float(beta)
