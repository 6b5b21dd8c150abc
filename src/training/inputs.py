"""What a run starts from: the base, its layers' settings, training and held-out data, read and checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from src.adapters.apply import how_quantized
from src.adapters.layer_profile import LayerSetting, with_rates
from src.adapters.tensors import settings_for
from src.checkpoint.base import load_base_and_fingerprint
from src.checkpoint.dimensions import Dimensions
from src.console import say
from src.data.binidx import corpus_at
from src.data.examples import read_texts
from src.data.load_template import (
    check_loss_on,
    check_template,
    difference,
    load_template,
    loss_on_in,
    model_note,
    recorded,
    recorded_in,
)
from src.data.packing import Text
from src.data.source import data_file
from src.data.templates import CLASSIC, Template
from src.data.thinking import LOSS_ON
from src.errors import UserError
from src.files import sha256
from src.preference.kto import are_thumbs
from src.preference.loss import is_of_thumbs, needs_reference, without_reference
from src.preference.pairs import check_sidecar, has_references, load_pairs
from src.preference.stored import Pairs
from src.quantization.linear import STRATEGY_SUFFIXES
from src.tokenizer import Tokenizer, load_tokenizer
from src.training.config import ModelSettings, StepSettings, TrainConfig


@dataclass(frozen=True)
class Data:
    """Pairs, or with `--sft 1` texts, and where they come from."""

    path: str
    items: Pairs | Sequence[Text]
    facts: dict[str, Any]  # what config.json and the report say about them

    @property
    def pairs(self) -> Pairs:
        return cast(Pairs, self.items)

    @property
    def texts(self) -> Sequence[Text]:
        return cast(Sequence[Text], self.items)

    @property
    def template(self) -> dict[str, Any]:
        """What is recorded of the template that the data are in."""
        return self.facts.get("template") or recorded_in(self.sidecar)

    @property
    def loss_on(self) -> str:
        return self.facts.get("loss_on") or loss_on_in(self.sidecar)

    @property
    def sidecar(self) -> dict[str, Any] | None:
        return self.facts.get("sidecar")

    def sha256(self) -> str:
        """Of the file (of a tokenized corpus both) in hexadecimal; the sidecar's was checked when the file was read."""
        if self.sidecar:
            return self.sidecar["sha256"]
        return "-".join(map(sha256, corpus_at(self.path) or (self.path,)))


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts. `weights` are the base's, and empty once the model has been built from them."""

    weights: dict[str, Tensor]
    dimensions: Dimensions
    base_fingerprint: str
    settings: list[LayerSetting]
    train: Data
    held_out: Data | None
    lines: list[str]  # for stderr once all checks have passed, since an error is printed alone


def read_inputs(config: TrainConfig, expected: dict[str, Any]) -> Inputs:
    """Read all files that the flags name.

    Args:
        expected: dimensions that the flags state, by flag, to be compared with the checkpoint's.

    Raises UserError if a file is missing or damaged, or does not fit the others.
    """
    weights, dimensions, base = load_base_and_fingerprint(config.model.load_model)
    check_flags(dimensions, expected, config.model.load_model)
    settings = layer_settings(config.model, config.steps, weights)
    held = how_quantized(settings, weights, config.model.quantization)
    lines: list[str] = []

    if config.objective.sft:
        for flag, file in (("--train_data_file", config.data.train_data_file), ("--eval_file", config.data.eval_file)):
            if file and not corpus_at(file):
                data_file(file, flag)
        tokenizer = load_tokenizer(config.data.tokenizer, dimensions.vocab_size)
        template = load_template(config.data.template or CLASSIC.name, tokenizer)

    def read(path: str) -> Data:
        if config.objective.sft:
            return training_texts(path, config, tokenizer, template)
        return training_pairs(path, config, dimensions, base, held, lines)

    train_file = config.data.train_data_file if config.objective.sft else config.data.rlhf_train_file
    assert train_file is not None  # the flags were checked for the one that is needed
    train, eval_file = read(train_file), config.data.eval_file
    held_out = read(eval_file) if eval_file else None
    lines += model_note(config.model.load_model, train.template)
    if held_out and held_out.loss_on != train.loss_on:
        lines.append(f"warning: --eval_file {eval_file} was prepared with --loss_on {held_out.loss_on}, the training data with "
                     f"--loss_on {train.loss_on}")
    if held_out and (found := difference(held_out.template, train.template)):
        lines.append(f"warning: --eval_file {eval_file} is in another --template than the training data: {found}")
    return Inputs(weights, dimensions, base, settings, train, held_out, lines)


def check_flags(dimensions: Dimensions, expected: dict[str, Any], path: str) -> None:
    """Refuse flags that contradict the checkpoint; the message gives both values."""
    found = {"--n_layer": dimensions.n_layer, "--n_embd": dimensions.n_embd, "--vocab_size": dimensions.vocab_size,
             "--my_testing": dimensions.version}
    for flag, value in expected.items():
        if value is not None and value != found[flag]:
            raise UserError(f"{flag} says {value}, but {path} has {found[flag]}; leave the flag out or correct it")


def layer_settings(model: ModelSettings, steps: StepSettings, weights: dict[str, Tensor]) -> list[LayerSetting]:
    """The layer profile's rows, or those of `auto`, with the rates in force."""
    rates = steps.lr_init, steps.lr_final
    settings = settings_for(weights, model.layer_profile, model.peft, model.lora_r, model.lora_alpha, rates)
    return settings if steps.lr_advanced or model.layer_profile == "auto" else with_rates(settings, *rates)


def training_pairs(path: str, config: TrainConfig, dimensions: Dimensions, base: str, held: dict[str, Any],
                   lines: list[str]) -> Data:
    """Load a `.save`, whose references must come from this base, at this precision and quantization: margins start at 0.

    For a loss without a reference they are neither used nor checked.

    Args:
        held: how the model stores its weights, as from `how_quantized`.
        lines: gets the lines for stderr.
    """
    max_len, loss = config.data.rlhf_max_corpus_len, config.objective.loss
    pairs, sidecar, left_out = load_pairs(path, dimensions.vocab_size, max_len, thumbs=is_of_thumbs(loss))
    kinds = _kinds_of_thumbs(path, pairs) if is_of_thumbs(loss) else {}
    data = Data(path, pairs, {"pairs": len(pairs), **kinds, **left_out, "sidecar": sidecar})
    check_template(config.data.template, data.template, path)
    check_loss_on(config.data.loss_on, data.loss_on, path)
    if left_out["too_long"] or left_out["empty_answer"]:
        lines.append(f"{path}: left out {left_out['too_long']} pairs longer than {max_len} tokens and "
                     f"{left_out['empty_answer']} with an empty answer; {len(pairs)} remain")
    if not needs_reference(loss):
        return data
    if not has_references(pairs, sidecar):
        *first, last = without_reference()
        raise UserError(f"{path}: it was made without references, which --loss {loss} needs; run rlhf_dpo_generate_save.py with "
                        f"--reference 1, or take a loss without a reference: --loss {', '.join(first)} or {last}")
    if sidecar is None:
        lines.append(f"warning: {path} has no {Path(path).name}.json next to it, so it can't be checked that its references come "
                     f"from {config.model.load_model} at {config.machine.precision}")
        return data
    if check_sidecar(sidecar, {"base_fingerprint": base}):
        raise UserError(f"{path}: its references were computed with another base model ({sidecar.get('base_model', 'unnamed')}) "
                        f"than {config.model.load_model}; run rlhf_dpo_generate_save.py with this one")
    differences = check_sidecar(sidecar, {"precision": config.machine.precision, **held})
    if differences and not config.run.allow_reference_mismatch:
        raise UserError(f"{path}: {'; '.join(differences)}; margins would not start at 0. Run rlhf_dpo_generate_save.py with "
                        f"{_preparation(config, held)}, or train with --allow_reference_mismatch 1")
    lines += [f"warning: {path}: {difference}" for difference in differences]
    return data


def _kinds_of_thumbs(path: str, pairs: Pairs) -> dict[str, int]:
    """How many thumbs up and down there are. Raises UserError if some of the pairs are none that KTO can train on."""
    two, alone = (int((~of_which).sum()) for of_which in (are_thumbs(pairs.tokens), pairs.has_kl()))
    if two:
        raise UserError(f"{path}: {two} of its {len(pairs)} pairs have two answers, and --loss kto takes single ones, thumbs up "
                        "and down; run rlhf_dpo_generate_save.py with --unpair 1, which makes each pair one of both")
    if alone:
        raise UserError(f"{path}: {alone} of its {len(pairs)} thumbs have no mismatched answer for KTO's estimate of the KL; run "
                        "rlhf_dpo_generate_save.py again, which adds it")
    up = int((pairs.tokens.lengths()[1] > 0).sum())
    return {"thumbs_up": up, "thumbs_down": len(pairs) - up}


def _preparation(config: TrainConfig, held: dict[str, Any]) -> str:
    """The flags of a preparation whose references fit the run."""
    model, device = config.model, "cuda" if config.machine.accelerator == "gpu" else "cpu"
    auto = f" --peft {model.peft} --lora_r {model.lora_r}" if model.layer_profile == "auto" else ""
    needed = held["unquantized_blocks"] or held["quantized_otherwise"]
    profile = f" --layer_profile {model.layer_profile}{auto}" if needed else ""
    return f"--strategy '{device} {config.machine.precision}{STRATEGY_SUFFIXES[model.quantization]}'{profile}"


def training_texts(path: str, config: TrainConfig, tokenizer: Tokenizer, template: Template) -> Data:
    """Read the texts that `--sft 1` trains or is evaluated on, and summarize them on stderr."""
    max_len, loss_on = config.data.rlhf_max_corpus_len, config.data.loss_on or LOSS_ON[0]
    texts, counts = read_texts(path, tokenizer, max_len, config.run.seed, config.objective.sft_on_prompt,
                               config.data.skip_bad_rows, template, loss_on)
    say(f"{path}: {counts.rows} rows make {len(texts)} texts, with a loss on {counts.trained} tokens; {counts.cut} cut "
        f"and {counts.dropped} dropped at {max_len} tokens")
    counts.changes.report(path, tokenizer.name)
    return Data(path, texts, {"texts": len(texts), **asdict(counts), "tokenizer": tokenizer.name, "template": recorded(template),
                             "loss_on": loss_on})
