"""What a run trains on or is evaluated on, read from its file, checked against the model, and told."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from src.checkpoint.dimensions import Dimensions
from src.console import say
from src.data.examples import read_texts
from src.data.packing import Text
from src.errors import UserError
from src.preference.loss import needs_reference
from src.preference.pairs import Pair, check_sidecar, has_references, load_pairs
from src.quantization.linear import STRATEGY_SUFFIXES
from src.tokenizer import load_tokenizer
from src.training.config import TrainConfig


def training_pairs(path: str, config: TrainConfig, dimensions: Dimensions, base: str,
                   held: dict[str, Any], lines: list[str]) -> tuple[list[Pair], dict[str, Any]]:
    """Load a `.save`, whose references must come from this base, at this precision and quantization: margins start at 0.

    For a loss without a reference they are neither used nor checked.

    Args:
        held: how the model holds its weights, as `how_quantized` tells.
        lines: gets what is to be told on stderr once nothing is wrong with the run, since an error stands alone.

    Returns the pairs, and what config.json and the report tell of them.
    """
    pairs, sidecar, left_out = load_pairs(path, dimensions.vocab_size, config.rlhf_max_corpus_len)
    facts = {"pairs": len(pairs), **left_out, "sidecar": sidecar}
    if left_out["too_long"] or left_out["empty_answer"]:
        lines.append(f"{path}: left out {left_out['too_long']} pairs longer than {config.rlhf_max_corpus_len} tokens and "
                     f"{left_out['empty_answer']} with an empty answer; {len(pairs)} remain")
    if not needs_reference(config.loss):
        return pairs, facts
    if not has_references(pairs, sidecar):
        raise UserError(f"{path}: it was made without references, which --loss {config.loss} needs; "
                        "run rlhf_dpo_generate_save.py with --reference 1, or take a loss without one: --loss simpo, orpo or cpo")
    if sidecar is None:
        lines.append(f"warning: {path} has no {Path(path).name}.json beside it, so it can't be checked that its references come "
                     f"from {config.load_model} at {config.precision}")
        return pairs, facts
    if check_sidecar(sidecar, {"base_fingerprint": base}):
        raise UserError(f"{path}: its references were computed with another base model ({sidecar.get('base_model', 'unnamed')}) "
                        f"than {config.load_model}; run rlhf_dpo_generate_save.py with this one")
    differences = check_sidecar(sidecar, {"precision": config.precision, **held})
    if differences and not config.allow_reference_mismatch:
        suffix = STRATEGY_SUFFIXES[config.quantization]
        device = "cuda" if config.accelerator == "gpu" else "cpu"
        auto = f" --peft {config.peft} --lora_r {config.lora_r}" if config.layer_profile == "auto" else ""
        needed = held["unquantized_blocks"] or held["quantized_otherwise"]
        profile = f" --layer_profile {config.layer_profile}{auto}" if needed else ""
        raise UserError(f"{path}: {'; '.join(differences)}; margins would not start at 0. Run rlhf_dpo_generate_save.py with "
                        f"--strategy '{device} {config.precision}{suffix}'{profile}, or train with --allow_reference_mismatch 1")
    lines += [f"warning: {path}: {difference}" for difference in differences]
    return pairs, facts


def training_texts(path: str, config: TrainConfig, dimensions: Dimensions) -> tuple[list[Text], dict[str, Any]]:
    """Read what `--sft 1` trains on or is evaluated on, and tell on stderr what it is.

    Returns the texts, and what config.json and the report tell of them.
    """
    tokenizer = load_tokenizer(config.tokenizer, dimensions.vocab_size)
    texts, report = read_texts(path, tokenizer, config.rlhf_max_corpus_len, config.seed, config.sft_on_prompt,
                               config.skip_bad_rows)
    say(f"{path}: {report.rows} rows make {len(texts)} texts, {report.trained} tokens of them with a loss; {report.cut} cut "
        f"and {report.dropped} dropped at {config.rlhf_max_corpus_len} tokens")
    report.changes.report(path, tokenizer.name)
    return texts, {"texts": len(texts), **asdict(report), "tokenizer": tokenizer.name}
