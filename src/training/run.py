"""A training run from its configuration: check everything, build the model, hand it to Lightning."""

import logging
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from torch import Tensor

from src.adapters.apply import apply_layer_profile, how_quantized, quantized_linears
from src.adapters.files import adapter_tensors, load_adapter
from src.adapters.layer_profile import LayerSetting, auto_layer_profile, with_rates
from src.adapters.tensors import read_profile_for
from src.checkpoint.base import load_base_and_fingerprint
from src.checkpoint.dimensions import Dimensions
from src.console import say
from src.data.packing import Text
from src.errors import NotFinite, UserError, out_of_memory
from src.evaluation.picture import draw_curves, read_columns
from src.evaluation.report import write_report
from src.evaluation.samples import Answer, read_questions
from src.files import hold_folder, named_file, sha256
from src.kernels import recycle_memory
from src.model import build_model
from src.model.rwkv import RWKV
from src.preference.pairs import Pair
from src.run_files import CURVES_FILE, EVAL_FILE, FINAL_FILE, METRICS_FILE, REPORT_FILE
from src.training.checkpoint import SealedFile
from src.training.config import TrainConfig
from src.training.data import PairBatches, TrainingData
from src.training.environment import environment_of, ignore_settings
from src.training.folder import check_inputs, prepare_folder, resume_file
from src.training.loggers import make_loggers
from src.training.metrics import StepMetrics
from src.training.module import PreferenceModule
from src.training.processes import Others, check_can_start_others, quiet, share_cores, starts_others
from src.training.progress import ProgressBar
from src.training.saving import CheckAdapter, SaveAdapters, explain
from src.training.sources import training_pairs, training_texts
from src.training.watching import HeldOut, ReportWriter, Samples

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(config: TrainConfig, expected: dict[str, Any], answer: Answer | None = None, notes: Sequence[str] = ()) -> None:
    """Run it. Writes into `config.proj_dir`: config.json, metrics.jsonl, eval.jsonl, samples.jsonl, adapters, last.ckpt,
    curves.png, report.html.

    Args:
        expected: dimensions that the flags state, by flag, to be compared with the checkpoint's.
        answer: writes the answers of `config.samples` prompts; there are none without it. Handed in, since generation stands
            beside training and not below it.
        notes: lines for stderr about the command, told once nothing is wrong with it.

    Raises:
        UserError: whatever the user can mend; nothing has been written then, or what was written is good. Where training
            diverged, the message names the adapters that were checked.
    """
    environment = environment_of(config)
    if starts_others(config, environment):
        check_can_start_others(config)
    with hold_folder(Path(config.proj_dir), "--proj_dir") if environment.global_rank() == 0 else quiet():
        try:
            _train(config, environment, expected, answer, (*notes, *ignore_settings()))
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(_what_takes_less(config, error)) from error


def _train(config: TrainConfig, environment: ClusterEnvironment, expected: dict[str, Any], answer: Answer | None,
           notes: Sequence[str]) -> None:
    # Lightning's own chatter (which devices it found, tips for its loggers) says nothing that users can act on.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    check_inputs(Path(config.proj_dir), config)
    pl.seed_everything(config.seed, verbose=False)
    weights, dimensions, base = load_base_and_fingerprint(config.load_model)
    check_flags(dimensions, expected, config.load_model)
    settings = layer_settings(config, dimensions.n_layer, weights)

    held = how_quantized(settings, weights, config.quantization)
    train_file = config.train_data_file if config.sft else config.rlhf_train_file
    lines: list[str] = []

    def read(path: str) -> tuple[list[Pair] | list[Text], dict[str, Any]]:
        if config.sft:
            return training_texts(path, config, dimensions)
        return training_pairs(path, config, dimensions, base, held, lines)

    pairs, train_data = read(train_file)
    held_out, eval_data = read(config.eval_file) if config.eval_file else (None, None)

    model = _model(weights, dimensions, settings, config, base)
    batches = PairBatches(pairs, config.epoch_steps, config.micro_bsz, config.batch_tokens, config.accumulate_grad_batches,
                          config.seed, config.epoch_begin, config.devices)
    total_steps = batches.total_steps(config.epoch_count)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    folder = Path(config.proj_dir)
    if environment.global_rank() == 0:
        common = {"base_fingerprint": base, "rlhf_train_sha256": _sha256(train_file, train_data),
                  "eval_sha256": _sha256(config.eval_file, eval_data),
                  "tokenizer_sha256": _sha256(named_file("tokenizer", config.tokenizer)),
                  "layer_profile_rows": [asdict(setting) for setting in settings]}
        told = {"base": {name: getattr(dimensions, name) for name in ("version", "n_layer", "n_embd", "vocab_size")},
                "trained_parameters": trained, "total_steps": total_steps, "train_data": train_data, "eval_data": eval_data}
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
        checkpoint = prepare_folder(folder, config, common, told, shapes)
    else:
        checkpoint = resume_file(config)
    for line in [*lines, *notes]:
        say(line)
    held_in = f"{config.precision} {config.quantization or ''}".rstrip()
    say(f"{dimensions.version} L{dimensions.n_layer} D{dimensions.n_embd}, {trained:,} trained parameters, "
        f"{len(pairs)} {'texts' if config.sft else 'pairs'}, "
        f"{total_steps} optimizer steps, {held_in}")

    if config.warmup_steps >= total_steps:
        say(f"warning: --warmup_steps {config.warmup_steps} lasts as long as the run, so its full learning rate is never reached")

    module = PreferenceModule(model, settings, config, total_steps)
    asked = (held_out, eval_data) if held_out else (pairs, train_data)
    samples = _samples(folder, config, answer, *asked, dimensions.vocab_size)
    save, callbacks = _callbacks(folder, config, base, dimensions.version, total_steps, held_out, samples)
    trainer = _fit(config, environment, module, callbacks, TrainingData(batches), checkpoint, save)
    if trainer.is_global_zero:
        finish(folder)


def _model(weights: dict[str, Tensor], dimensions: Dimensions, settings: list[LayerSetting], config: TrainConfig,
           base: str) -> RWKV:
    """The base, whose fingerprint is `base`, with what trains in it; empties `weights`, so that they aren't held twice."""
    on_gpu = config.accelerator == "gpu"
    # With several devices each process moves its own copy; with one the weights go there straight.
    device = "cuda" if on_gpu and config.devices == 1 else "cpu"
    if not on_gpu:
        recycle_memory()
    model = build_model(weights, dimensions, DTYPES[config.precision], device, config.quantization,
                        hold=quantized_linears(settings, config.quantization))
    weights.clear()
    apply_layer_profile(model, settings, config.seed)
    if config.load_adapter:
        load_adapter(model, config.load_adapter, base)
    if config.compile:
        for block in model.blocks:
            block.att.compile(dynamic=True)
            block.ffn.compile(dynamic=True)
    return model


def _samples(folder: Path, config: TrainConfig, answer: Answer | None, asked: list[Pair], data: dict[str, Any],
             vocab_size: int) -> Samples | None:
    """What answers prompts of the pairs `asked`, `data` being what is known of their file; None where nothing does."""
    if answer is None or not config.samples or config.sft:
        return None
    if config.strategy.startswith("deepspeed_stage_3"):
        say("warning: no samples in the report, since stage 3 leaves no device a whole model to write them")
        return None
    questions = read_questions(asked, config.samples, data["sidecar"], vocab_size)
    return Samples(folder, questions, answer, config.sample_tokens) if questions else None


def _callbacks(folder: Path, config: TrainConfig, base: str, version: str, total_steps: int, held_out: list | None,
               samples: Samples | None) -> tuple[SaveAdapters, list[pl.Callback]]:
    """What saves, and all callbacks in Lightning's order: what tells of an epoch comes behind the check of its adapter."""
    metrics = StepMetrics(folder)
    evaluation = HeldOut(folder, held_out) if held_out else None
    growing = list(filter(None, (evaluation, samples)))
    save = SaveAdapters(folder, base, {"version": version, "loss": config.loss, "dpo_beta": config.dpo_beta,
                                       "dpo_alpha": config.dpo_alpha}, growing)
    bar = ProgressBar(metrics, evaluation, total_steps)
    return save, [metrics, CheckAdapter(), *growing, bar, save, ReportWriter(folder)]


def _fit(config: TrainConfig, environment: ClusterEnvironment, module: PreferenceModule, callbacks: list[pl.Callback],
         data: TrainingData, checkpoint: Path | None, save: SaveAdapters) -> pl.Trainer:
    """Train, in as many processes as there are devices."""
    plugins: list[Any] = [environment] if config.strategy.startswith("deepspeed") else [environment, SealedFile()]
    others: Others | nullcontext = nullcontext()
    if starts_others(config, environment):
        others = Others(config.devices - 1, environment.main_port)
        callbacks = [others, *callbacks]
    share_cores(config)
    with others:
        trainer = pl.Trainer(
            accelerator=config.accelerator, devices=config.devices, strategy=lightning_strategy(config), precision="32-true",
            max_epochs=config.epoch_count, accumulate_grad_batches=config.accumulate_grad_batches,
            gradient_clip_val=config.gradient_clip_val or None, logger=False, callbacks=callbacks, plugins=plugins,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1,
            default_root_dir=config.proj_dir,
        )
        # Lightning's own handlers exchange messages between the processes within a signal's handler, which hangs, and under
        # SLURM write checkpoints that nothing here goes on from.
        trainer._signal_connector.register_signal_handlers = lambda: None
        trainer.loggers = make_loggers(config) if trainer.is_global_zero else []
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as ended:  # what Lightning makes of Ctrl-C where nothing makes a Stopped of it, as in a notebook
            if not isinstance(ended.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        except NotFinite as error:
            raise explain(error, trainer.global_step, save.good, config) from error
    return trainer


def _what_takes_less(config: TrainConfig, error: Exception) -> str:
    whose = out_of_memory(error)
    batch = "--batch_tokens" if config.batch_tokens else "--micro_bsz"
    ways = [f"a smaller {batch}"] if config.batch_tokens or config.micro_bsz > 1 else []
    ways += [] if config.grad_cp else ["--grad_cp 1"]
    ways += [] if config.quantization else ["--quant 1"]
    return f"the {whose}'s memory is full; take {', '.join([*ways, 'a smaller --rlhf_max_corpus_len'])} or a smaller model"


def _sha256(path: str | None, told: dict[str, Any] | None = None) -> str | None:
    """Of a file, in hexadecimal; as its sidecar has it where that was found to agree when the file was read."""
    if path is None or not Path(path).is_file():
        return None
    if told and told.get("sidecar"):
        return told["sidecar"]["sha256"]
    return sha256(path)


def finish(folder: Path) -> None:
    """Draw the curves, write the report, and name what there is; one of them that can't be made is told."""
    def draw() -> None:
        draw_curves(read_columns(folder / METRICS_FILE), read_columns(folder / EVAL_FILE), folder / CURVES_FILE)

    for write in (draw, lambda: write_report(folder)):
        try:
            write()
        except UserError as error:
            say(f"warning: {error}")
    there = [folder / name for name in (FINAL_FILE, METRICS_FILE, REPORT_FILE) if (folder / name).is_file()]
    say(f"done: {', '.join(map(str, there))}")


def check_flags(dimensions: Dimensions, expected: dict[str, Any], path: str) -> None:
    """Refuse flags that contradict the checkpoint, both values told."""
    found = {"--n_layer": dimensions.n_layer, "--n_embd": dimensions.n_embd, "--vocab_size": dimensions.vocab_size,
             "--my_testing": dimensions.version}
    for flag, value in expected.items():
        if value is not None and value != found[flag]:
            raise UserError(f"{flag} says {value}, but {path} has {found[flag]}; leave the flag out or correct it")


def layer_settings(config: TrainConfig, n_layer: int, weights: dict[str, Tensor]) -> list[LayerSetting]:
    if config.layer_profile == "auto":
        return auto_layer_profile(n_layer, config.lr_init, config.lr_final, config.lora_r, config.lora_alpha, config.peft)
    settings = read_profile_for(weights, config.layer_profile, (config.lr_init, config.lr_final))
    return settings if config.lr_advanced else with_rates(settings, config.lr_init, config.lr_final)


def lightning_strategy(config: TrainConfig) -> Any:
    if not config.strategy.startswith("deepspeed"):
        return config.strategy
    from src.training.deepspeed import SteppingDeepSpeed

    stage = int(config.strategy.removeprefix("deepspeed_stage_")[0])
    offload = config.strategy.endswith("_offload")
    strategy = SteppingDeepSpeed(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
    strategy.config["train_micro_batch_size_per_gpu"] = config.micro_bsz
    return strategy
