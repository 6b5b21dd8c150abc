"""Whole runs on the CPU: what they write, how they go on after a break, and what they refuse."""

import json
from pathlib import Path

import pytest
import torch

import src.training.batches as micro_batches
import src.training.module as module
from src.adapters.files import merge_adapter, read_adapter
from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint, save_checkpoint
from src.errors import UserError
from src.model import build_model
from src.run_files import FACTS
from src.settings import flat
from src.training.folder import prepare_folder
from src.training.run import train
from tests.settings import changed
from tests.training.outside import lines

KEYS = {"step", "loss", "dpo_loss", "sft_loss", "pref_percentage", "pref_accuracy", "reward_chosen", "reward_rejected", "margin",
        "lr", "grad_norm", "tokens_per_s", "pairs_per_s", "peak_memory_bytes", "elapsed_s"}
TIMES = {"tokens_per_s", "pairs_per_s", "peak_memory_bytes", "elapsed_s"}


def numbers(path: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(path)]


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_run_writes_its_metrics_adapters_and_held_out_numbers(config, prepared, version):
    run = config(version, eval_file=str(prepared(version)), epoch_steps=6, accumulate_grad_batches=2)
    train(run, {})
    folder = Path(run.run.proj_dir)
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(set(line) == KEYS for line in metrics)
    assert abs(metrics[0]["margin"]) < 1e-4
    assert metrics[-1]["margin"] > 0.01
    assert metrics[0]["lr"] < metrics[2]["lr"] and abs(metrics[-1]["lr"] - 1e-4) < 1e-9
    shares = [line["pref_accuracy"] for line in metrics]
    average = 0.5
    for share, line in zip(shares, metrics, strict=True):
        average = 0.9 * average + 0.1 * share
        assert abs(line["pref_percentage"] - average) < 1e-9
    held_out = lines(folder / "eval.jsonl")
    assert [line["step"] for line in held_out] == [0, 3, 6]
    assert held_out[0]["accuracy"] == 0.5 and held_out[-1]["accuracy"] > 0.5
    written = {path.name for path in folder.iterdir()}
    assert {"rwkv-1.safetensors", "rwkv-2.safetensors", "rwkv-final.safetensors", "config.json", "curves.png"} <= written
    assert json.loads((folder / "config.json").read_text()).keys() - flat(run).keys() == set(FACTS)
    assert read_adapter(folder / "rwkv-final.safetensors").extra["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_compiled_run_gives_the_numbers_of_a_plain_one(config, prepared, tmp_path, version):
    """Over batches of many shapes, held-out evaluation between them, adapters over a quantized base."""
    pairs = str(prepared(version, "fp32", "int8"))
    changes = dict(quantization="int8", rlhf_train_file=pairs, eval_file=pairs)
    plain, compiled = config(version, **changes), config(version, compile=True, proj_dir=str(tmp_path / "compiled"), **changes)
    for run in (plain, compiled):
        train(run, {})
    for name in ("metrics.jsonl", "eval.jsonl"):
        for ours, theirs in zip(*(numbers(Path(run.run.proj_dir) / name) for run in (compiled, plain)), strict=True):
            # Fused kernels round another way; eight steps of it through Adam stay below a thousandth. Which side of 0 a margin
            # is on before the first step is rounding itself.
            ours, theirs = ({key: x for key, x in line.items() if not key.startswith("pref_")} for line in (ours, theirs))
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    assert lines(Path(compiled.run.proj_dir) / "eval.jsonl")[-1]["margin"] > 0.01


def test_a_resumed_run_gives_the_numbers_of_an_unbroken_one(config, material, tmp_path, break_off):
    profile = tmp_path / "profile.csv"  # with dropout, so that the random state matters
    profile.write_text("Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay\n"
                       "emb,freeze,,,,,,\n0,lora,4,8,0.2,1e-3,1e-4,0.01\n1,full,,,,1e-3,1e-4,0.01\nhead,freeze,,,,,,\n")
    unbroken = config(layer_profile=str(profile), epoch_count=3, epoch_steps=5, accumulate_grad_batches=2,
                      proj_dir=str(tmp_path / "unbroken"))
    train(unbroken, {})

    broken = changed(unbroken, proj_dir=str(tmp_path / "broken"))
    break_off(broken, at=9)  # in the second epoch
    assert len(lines(tmp_path / "broken" / "metrics.jsonl")) == 4
    train(changed(broken, resume=True), {})

    assert numbers(tmp_path / "broken" / "metrics.jsonl") == numbers(tmp_path / "unbroken" / "metrics.jsonl")
    one, other = (read_adapter(tmp_path / name / "rwkv-final.safetensors").weights for name in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_before_there_was_a_flag_had_its_default(config, tmp_path):
    run = config(strategy="deepspeed_stage_2")
    prepare_folder(tmp_path, run, {}, {}, {})
    (tmp_path / "last.ckpt").mkdir()  # as DeepSpeed has it, whose content is its own
    (tmp_path / "last.ckpt" / "manifest.json").write_text('{"record": {"step": 1, "lines": {}}, "files": {}}')
    before = json.loads((tmp_path / "config.json").read_text())
    for name in ("skip_bad_rows", "batch_tokens"):
        del before[name]
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert prepare_folder(tmp_path, changed(run, resume=True), {}, {}, {}) == tmp_path / "last.ckpt"
    with pytest.raises(UserError, match="skip_bad_rows was False in .* and is True now"):
        prepare_folder(tmp_path, changed(run, resume=True, skip_bad_rows=True), {}, {}, {})


def test_a_resume_without_a_checkpoint_starts_again(config):
    run = config(epoch_count=1)
    train(changed(run, resume=True), {})
    assert len(lines(Path(run.run.proj_dir) / "metrics.jsonl")) == 4


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_merged_model_gives_the_adapter_models_logits(config, tmp_path, version, ending):
    seen = {}

    class Spy(module.PreferenceModule):
        def on_train_end(self):
            seen["model"] = self.model.eval()

    run = config(version, epoch_count=1, lr_init=1e-2, lr_final=1e-2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.training.run.PreferenceModule", Spy)
        train(run, {})
    base = load_checkpoint(run.model.load_model)
    save_checkpoint(merge_adapter(base, Path(run.run.proj_dir) / "rwkv-final.safetensors"), tmp_path / f"merged{ending}")
    merged = load_checkpoint(tmp_path / f"merged{ending}")
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {name: (t.shape, t.dtype) for name, t in base.items()}
    tokens = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(0))
    dimensions = read_dimensions(merged, "merged")
    with torch.no_grad():
        models = (build_model(merged, dimensions), seen["model"], build_model(base, dimensions))
        logits = [model.logits(model(tokens)[0]) for model in models]
    # Two roundings of float32 weights, through two random layers.
    assert (logits[0] - logits[1]).norm() < 1e-5 * logits[1].norm()
    assert (logits[0] - logits[2]).norm() > 1e-3 * logits[2].norm()


def test_nf4_and_bf16_train_with_margins_from_zero(config, prepared):
    run = config(precision="bf16", quantization="nf4", rlhf_train_file=str(prepared("x070", "bf16", "nf4")), grad_cp=True)
    train(run, {})
    metrics = lines(Path(run.run.proj_dir) / "metrics.jsonl")
    assert abs(metrics[0]["margin"]) < 0.05  # bf16 products of another batch shape round another way
    assert metrics[-1]["margin"] > metrics[0]["margin"]


def test_references_of_another_quantization_are_refused_with_the_way_out(config, prepared):
    with pytest.raises(UserError, match=r"quantization.*--strategy 'cpu fp32nf4'"):
        train(config(quantization="nf4"), {})
    run = config(quantization="nf4", allow_reference_mismatch=True, epoch_count=1)
    train(run, {})
    assert abs(lines(Path(run.run.proj_dir) / "metrics.jsonl")[0]["margin"]) > 1e-3  # which is why it is refused


def test_a_save_of_another_base_model_is_refused(config, prepared):
    with pytest.raises(UserError, match=r"another base model \(x060.pth\)"):
        train(config("x070", rlhf_train_file=str(prepared("x060"))), {})


def test_a_folder_with_a_run_is_not_overwritten(config):
    run = config(epoch_count=1)
    train(run, {})
    with pytest.raises(UserError, match="already holds a run"):
        train(run, {})
    with pytest.raises(UserError, match="dpo_beta was 0.1"):
        train(changed(run, resume=True, dpo_beta=0.2), {})


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_adapter(config, monkeypatch, broken):
    run = config(epoch_count=3)
    calls = 0
    pair_losses = module.pair_losses

    def explodes(*arguments, **named):
        nonlocal calls
        calls += 1
        losses = pair_losses(*arguments, **named)
        if calls == 6:
            # A finite loss whose gradient is not: the square root's, at 0.
            factor = float("nan") if broken == "loss" else (1 + (losses["loss"] * 0).sqrt())
            losses["loss"] = losses["loss"] * factor
        return losses

    monkeypatch.setattr(module, "pair_losses", explodes)
    with pytest.raises(UserError, match="step 6: the .* not finite.* good in .*/run: rwkv-1.safetensors"):
        train(run, {})
    weights = read_adapter(Path(run.run.proj_dir) / "rwkv-1.safetensors").weights
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert not (Path(run.run.proj_dir) / "rwkv-final.safetensors").exists()


def test_dimensions_that_contradict_the_checkpoint_are_told_with_both_values(config):
    flags = (("--n_layer", 24, 2), ("--n_embd", 32, 64), ("--vocab_size", 65536, 256), ("--my_testing", "x060", "x070"))
    for flag, value, found in flags:
        with pytest.raises(UserError, match=f"{flag} says {value}, but .* has {found}"):
            train(config(), {flag: value})
    assert not Path(config().run.proj_dir).exists()


def test_wandb_works_with_no_account(config, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = config(epoch_count=1, wandb="a project")
    train(run, {})
    assert list(Path(run.run.proj_dir).glob("wandb/offline-run-*"))


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_batches_by_tokens_see_every_pair_once_an_epoch_and_resume(config, tmp_path, optim):
    unbroken = config(epoch_steps=0, batch_tokens=300, epoch_count=2, optim=optim, proj_dir=str(tmp_path / "unbroken"))
    train(unbroken, {})
    metrics = lines(tmp_path / "unbroken" / "metrics.jsonl")
    assert metrics[-1]["margin"] > metrics[0]["margin"] and abs(metrics[0]["margin"]) < 1e-4
    seen, collate = [], micro_batches.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batches, "collate", lambda pairs: seen.append(pairs) or collate(pairs))
        broken = changed(unbroken, proj_dir=str(tmp_path / "broken"))
        patch.setattr("src.training.saving.SaveAdapters.on_train_batch_end", stop_in_the_second_epoch, raising=False)
        with pytest.raises(ConnectionError):
            train(broken, {})
    first_epoch = [tuple(pair[1] + pair[2]) for batch in seen for pair in batch][:12]
    assert len(set(first_epoch)) == 12 and len(seen[0]) > 1
    train(changed(broken, resume=True), {})
    assert numbers(tmp_path / "broken" / "metrics.jsonl") == numbers(tmp_path / "unbroken" / "metrics.jsonl")


def stop_in_the_second_epoch(self, trainer, *_):
    if trainer.current_epoch == 1:
        raise ConnectionError("the plug was pulled")
