"""A training run from its configuration: read and check everything, build the model, train it, report."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import ClusterEnvironment

from src.adapters.apply import apply_layer_profile, quantized_linears
from src.adapters.files import adapter_tensors, load_adapter
from src.console import say
from src.data.load_template import adapter_notes, recorded_in_adapter
from src.errors import UserError, out_of_memory
from src.evaluation.picture import draw_curves, read_columns
from src.evaluation.report import write_report
from src.evaluation.samples import Answer, read_questions
from src.files import hold_folder, named_file, sha256
from src.kernels import recycle_memory
from src.model import build_model
from src.model.rwkv import RWKV
from src.preference.kto import balance
from src.preference.loss import is_of_thumbs
from src.quantization.strategy import PRECISIONS
from src.run_files import CURVES_FILE, EVAL_FILE, FINAL_FILE, METRICS_FILE, REPORT_FILE
from src.training.batches import PairBatches
from src.training.config import TrainConfig
from src.training.environment import environment_of, ignore_settings
from src.training.folder import check_inputs, prepare_folder, resume_file
from src.training.inputs import Data, Inputs, read_inputs
from src.training.module import PreferenceModule
from src.training.processes import check_can_start_others, quiet, starts_others
from src.training.trainer import fit, make_callbacks, quiet_lightning
from src.training.watching import Samples


def train(config: TrainConfig, expected: dict[str, Any], answer: Answer | None = None, notes: Sequence[str] = ()) -> None:
    """Run it. Writes into `config.run.proj_dir`: config.json, metrics.jsonl, eval.jsonl, samples.jsonl, adapters, last.ckpt,
    curves.png, report.html.

    Args:
        expected: dimensions that the flags state, by flag, to be compared with the checkpoint's.
        answer: writes the answers to `config.run.samples` prompts; None for no samples. Passed in, since training may not import
            generation.
        notes: lines about the command, printed on stderr once all checks have passed.

    Raises:
        UserError: an error that the user can fix; nothing has been written then, or what was written is good. Where training
            diverged, the message names the adapters that were checked.
    """
    environment = environment_of(config)
    if starts_others(config, environment):
        check_can_start_others(config)
    with hold_folder(Path(config.run.proj_dir), "--proj_dir") if environment.global_rank() == 0 else quiet():
        try:
            _train(config, environment, expected, answer, (*notes, *ignore_settings()))
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(_what_takes_less(config, error)) from error


def _train(config: TrainConfig, environment: ClusterEnvironment, expected: dict[str, Any], answer: Answer | None,
           notes: Sequence[str]) -> None:
    quiet_lightning()
    folder = Path(config.run.proj_dir)
    check_inputs(folder, config)
    pl.seed_everything(config.run.seed)
    inputs = read_inputs(config, expected)
    model = _model(inputs, config)
    steps = config.steps
    batches = PairBatches(inputs.train.items, steps.epoch_steps, steps.micro_bsz, steps.batch_tokens,
                          steps.accumulate_grad_batches, config.run.seed, steps.epoch_begin, config.machine.devices,
                          with_kl=is_of_thumbs(config.objective.loss) and not config.objective.sft)
    total_steps = batches.total_steps(steps.epoch_count)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if environment.global_rank() == 0:
        checkpoint = _prepare(folder, config, inputs, model, trained, total_steps)
    else:
        checkpoint = resume_file(config)
    for line in [*inputs.lines, *notes, *_about_thumbs(config, inputs.train, batches)]:
        say(line)
    _say_what_trains(config, inputs, trained, total_steps)

    module = PreferenceModule(model, inputs.settings, config, total_steps)
    samples = _samples(folder, config, answer, inputs.held_out or inputs.train, inputs.dimensions.vocab_size)
    save, callbacks = make_callbacks(config, inputs.base_fingerprint, inputs.dimensions.version, total_steps, inputs.held_out,
                                     samples, {"template": inputs.train.template, "loss_on": inputs.train.loss_on})
    if fit(config, environment, module, callbacks, batches, checkpoint, save).is_global_zero:
        finish(folder)


def _model(inputs: Inputs, config: TrainConfig) -> RWKV:
    """The base with its adapters; empties `inputs.weights`, so that they aren't in memory twice."""
    on_gpu = config.machine.accelerator == "gpu"
    # With several devices Lightning moves each process's copy; with one the weights go straight there.
    device = "cuda" if on_gpu and config.machine.devices == 1 else "cpu"
    if not on_gpu:
        recycle_memory()
    quantization = config.model.quantization
    model = build_model(inputs.weights, inputs.dimensions, PRECISIONS[config.machine.precision], device, quantization,
                        hold=quantized_linears(inputs.settings, quantization))
    inputs.weights.clear()
    apply_layer_profile(model, inputs.settings, config.run.seed)
    if config.model.load_adapter:
        adapter = load_adapter(model, config.model.load_adapter, inputs.base_fingerprint)
        trained = recorded_in_adapter(adapter.extra, adapter.path)
        inputs.lines.extend(adapter_notes(adapter.path, trained, inputs.train.template, inputs.train.loss_on))
    if config.steps.compile:
        for block in model.blocks:
            block.att.compile(dynamic=True)
            block.ffn.compile(dynamic=True)
    return model


def _prepare(folder: Path, config: TrainConfig, inputs: Inputs, model: RWKV, trained: int, total_steps: int) -> Path | None:
    """Prepare the run's folder with its config.json; returns the checkpoint to resume from, None for a fresh start."""
    held_out, tokenizer, dimensions = inputs.held_out, named_file("tokenizer", config.data.tokenizer), inputs.dimensions
    common = {"base_fingerprint": inputs.base_fingerprint, "rlhf_train_sha256": inputs.train.sha256(),
              "eval_sha256": held_out.sha256() if held_out else None,
              "tokenizer_sha256": sha256(tokenizer) if tokenizer and Path(tokenizer).is_file() else None,
              "template_fingerprint": inputs.train.template["fingerprint"], "loss_on": inputs.train.loss_on,
              "layer_profile_rows": [asdict(setting) for setting in inputs.settings]}
    facts = {"base": {name: getattr(dimensions, name) for name in ("version", "n_layer", "n_embd", "vocab_size")},
             "trained_parameters": trained, "total_steps": total_steps, "train_data": inputs.train.facts,
             "eval_data": held_out.facts if held_out else None}
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    return prepare_folder(folder, config, common, facts, shapes)


def _say_what_trains(config: TrainConfig, inputs: Inputs, trained: int, total_steps: int) -> None:
    dimensions, warmup = inputs.dimensions, config.steps.warmup_steps
    held_in = f"{config.machine.precision} {config.model.quantization or ''}".rstrip()
    say(f"{dimensions.version} L{dimensions.n_layer} D{dimensions.n_embd}, {trained:,} trained parameters, "
        f"{len(inputs.train.items)} {_items(config)}, {total_steps} optimizer steps, {held_in}")
    if warmup >= total_steps:
        say(f"warning: --warmup_steps {warmup} lasts as long as the run, so the full learning rate is never reached")


def _items(config: TrainConfig) -> str:
    return "texts" if config.objective.sft else "thumbs" if is_of_thumbs(config.objective.loss) else "pairs"


def _about_thumbs(config: TrainConfig, train: Data, batches: PairBatches) -> list[str]:
    """Lines on what KTO asks of its data and steps."""
    if not batches.with_kl:
        return []
    lines, weights = [], config.objective.of_the_losses
    if words := balance(train.facts["thumbs_up"], train.facts["thumbs_down"], weights["kto_desirable_weight"],
                        weights["kto_undesirable_weight"]):
        lines.append(f"warning: {train.path}: {words}")
    if batches.smallest_step() < 2:
        lines.append("warning: there are optimizer steps of a single thumb, whose KL is too rough an estimate for KTO; take a "
                     f"larger --accumulate_grad_batches, such as {max(8, 2 * config.steps.accumulate_grad_batches)}, that leaves "
                     "no single one for an epoch's last step")
    return lines


def _samples(folder: Path, config: TrainConfig, answer: Answer | None, asked: Data, vocab_size: int) -> Samples | None:
    """The callback that answers prompts of the pairs `asked`; None where there is none."""
    if answer is None or not config.run.samples or config.objective.sft:
        return None
    if config.machine.strategy.startswith("deepspeed_stage_3"):
        say("warning: no samples in the report, since with stage 3 no device has the whole model to write them")
        return None
    questions = read_questions(asked.pairs, config.run.samples, asked.sidecar, vocab_size)
    return Samples(folder, questions, answer, config.run.sample_tokens) if questions else None


def _what_takes_less(config: TrainConfig, error: Exception) -> str:
    whose, steps = out_of_memory(error), config.steps
    batch = "--batch_tokens" if steps.batch_tokens else "--micro_bsz"
    ways = [f"a smaller {batch}"] if steps.batch_tokens or steps.micro_bsz > 1 else []
    ways += [] if steps.grad_cp else ["--grad_cp 1"]
    ways += [] if config.model.quantization else ["--quant 1"]
    return f"the {whose}'s memory is full; take {', '.join([*ways, 'a smaller --rlhf_max_corpus_len'])} or a smaller model"


def finish(folder: Path) -> None:
    """Draw the curves, write the report, and list the files; curves or a report that can't be made cost only a warning."""
    def draw() -> None:
        draw_curves(read_columns(folder / METRICS_FILE), read_columns(folder / EVAL_FILE), folder / CURVES_FILE)

    for write in (draw, lambda: write_report(folder)):
        try:
            write()
        except UserError as error:
            say(f"warning: {error}")
    there = [folder / name for name in (FINAL_FILE, METRICS_FILE, REPORT_FILE) if (folder / name).is_file()]
    say(f"done: {', '.join(map(str, there))}")
