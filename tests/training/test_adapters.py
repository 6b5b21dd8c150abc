"""Whole runs with every adapter: margins that start at 0, adapters that merge, go on after a break, and go on from a file."""

import json
from pathlib import Path

import pytest
import torch

from src.adapters.files import merge_adapter, read_adapter
from src.adapters.layer_profile import BLOCK_MODES
from src.checkpoint.io import load_checkpoint
from src.errors import UserError
from src.training.run import train
from tests.conftest import prepare_csv
from tests.settings import changed

HEADER = "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,FullParts\n"
ENDS = "emb,freeze,,,,,,,,,\n{}head,{},4,8,0,1e-3,1e-4,0.01,,,\n"
# The material has two blocks, so that the modes go in pairs; the head takes one more.
PAIRS = [("pissa", "bone", "dora"), ("dora", "state", "pissa")]
SCHEMES = [None, "int8", "nf4"]


def profile(folder: Path, first: str, second: str, head: str, dropout: float = 0.0) -> Path:
    path = folder / f"{first}-{second}.csv"
    rows = [f'{layer},{mode},4,8,{dropout},1e-3,1e-4,0.01,0.1,0.01,"{full}"\n'
            for layer, mode, full in ((0, first, "ln1,att.key"), (1, second, ""))]
    path.write_text(HEADER + ENDS.format("".join(rows), head))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pair", PAIRS)
def test_margins_start_at_zero_and_grow(config, material, tmp_path, version, scheme, pair):
    csv = profile(tmp_path, *pair)
    save = tmp_path / "pairs.save"
    prepare_csv(material / f"{version}.pth", material / "pairs.csv", save, quantization=scheme, profile=str(csv))
    run = config(version, rlhf_train_file=str(save), eval_file=str(save), quantization=scheme, layer_profile=str(csv),
                 epoch_count=1, grad_cp=scheme == "nf4")
    train(run, {})
    before, after = lines(Path(run.run.proj_dir) / "eval.jsonl")
    # beta 0.1 times float32 sums over about 20 tokens.
    assert abs(before["margin"]) < 1e-5 and before["accuracy"] == 0.5
    assert abs(lines(Path(run.run.proj_dir) / "metrics.jsonl")[0]["margin"]) < 1e-5
    assert after["margin"] > 1e-3 and after["loss"] < before["loss"]
    base = load_checkpoint(run.model.load_model)
    merged = merge_adapter(base, Path(run.run.proj_dir) / "rwkv-final.safetensors")
    assert not torch.equal(merged["head.weight"], base["head.weight"]) and merged.keys() == base.keys()
    assert (Path(run.run.proj_dir) / "rwkv-final.state.pth").exists() == ("state" in pair)


@pytest.mark.parametrize("peft", BLOCK_MODES)
def test_each_mode_by_its_flag(config, prepared, peft):
    run = config(peft=peft, eval_file=str(prepared("x070")), epoch_count=1, lr_init=3e-2 if peft == "state" else 1e-3)
    train(run, {})
    before, after = lines(Path(run.run.proj_dir) / "eval.jsonl")
    assert abs(before["margin"]) < 1e-5 and after["margin"] > 1e-3
    adapter = read_adapter(Path(run.run.proj_dir) / "rwkv-final.safetensors")
    assert {setting.mode for setting in adapter.settings} == {"freeze", peft}


def test_bf16_on_a_plain_base_starts_within_bf16s_rounding(config, prepared):
    """PiSSA's frozen part is no residual rounded to bf16, or the margin would start where NF4's does."""
    for peft in ("lora", "pissa", "dora", "bone"):
        run = config(peft=peft, precision="bf16", rlhf_train_file=str(prepared("x070", "bf16")), epoch_count=1,
                     eval_file=str(prepared("x070", "bf16")), proj_dir=config().run.proj_dir + peft)
        train(run, {})
        assert abs(lines(Path(run.run.proj_dir) / "eval.jsonl")[0]["margin"]) < 0.01


@pytest.mark.parametrize(("pair", "scheme"), [(PAIRS[0], "int8"), (PAIRS[1], None)])
def test_a_resumed_run_gives_the_bytes_of_an_unbroken_one(config, material, tmp_path, break_off, pair, scheme):
    csv = profile(tmp_path, *pair, dropout=0.2)
    prepare_csv(material / "x070.pth", material / "pairs.csv", tmp_path / "pairs.save", quantization=scheme, profile=str(csv))
    unbroken = config(rlhf_train_file=str(tmp_path / "pairs.save"), layer_profile=str(csv), quantization=scheme, epoch_count=2,
                      epoch_steps=3, proj_dir=str(tmp_path / "unbroken"))
    train(unbroken, {})
    broken = changed(unbroken, proj_dir=str(tmp_path / "broken"))
    break_off(broken, at=5)  # in the second epoch
    train(changed(broken, resume=True), {})
    one, other = ((tmp_path / name / "rwkv-final.safetensors").read_bytes() for name in ("unbroken", "broken"))
    assert one == other


@pytest.mark.parametrize("peft", BLOCK_MODES)
def test_a_run_goes_on_from_an_adapter_file(config, prepared, tmp_path, peft):
    first = config(peft=peft, eval_file=str(prepared("x070")), epoch_count=1, lr_init=3e-2 if peft == "state" else 1e-3)
    train(first, {})
    file = Path(first.run.proj_dir) / "rwkv-final.safetensors"
    second = changed(first, proj_dir=str(tmp_path / "second"), load_adapter=str(file))
    train(second, {})
    ended, (began, after) = lines(Path(first.run.proj_dir) / "eval.jsonl")[-1], lines(tmp_path / "second" / "eval.jsonl")
    assert began | {"step": 4} == ended and ended["margin"] > 1e-3  # measured from the same references
    assert after["margin"] > began["margin"]


def test_an_adapter_file_of_another_profile_or_base_is_refused(config, prepared, tmp_path):
    first = config(epoch_count=1)
    train(first, {})
    file = str(Path(first.run.proj_dir) / "rwkv-final.safetensors")
    second = changed(first, proj_dir=str(tmp_path / "second"), load_adapter=file)
    for changes, said in (({"peft": "dora"}, "mode lora, but the layer profile says dora"), ({"lora_r": 8}, "lora_A has shape"),
                          ({"lora_alpha": 2.0}, "alpha 8.0"), ({"load_adapter": file + "x"}, "does not exist")):
        with pytest.raises(UserError, match=said):
            train(changed(second, **changes), {})
    other = config("x060", proj_dir=str(tmp_path / "second"), load_adapter=file)
    with pytest.raises(UserError, match="trained on the base model"):
        train(other, {})
    assert not (tmp_path / "second").exists()


def test_references_of_a_base_that_pissa_splits_otherwise_are_refused_with_the_way_out(config, prepared, material, tmp_path):
    run = config(peft="pissa", quantization="int8", rlhf_train_file=str(prepared("x070", "fp32", "int8")), epoch_count=1)
    way_out = r"quantized_otherwise.*--strategy 'cpu fp32i8' --layer_profile auto --peft pissa --lora_r 4"
    with pytest.raises(UserError, match=way_out):
        train(run, {})
    for differing in ({"lora_r": 3}, {"peft": "lora"}):
        prepare_csv(material / "x070.pth", material / "pairs.csv", tmp_path / "pairs.save", quantization="int8", peft="pissa",
                    lora_r=4)
        with pytest.raises(UserError, match="quantized_otherwise"):
            train(changed(run, rlhf_train_file=str(tmp_path / "pairs.save"), **differing), {})
    train(changed(run, rlhf_train_file=str(tmp_path / "pairs.save")), {})
    assert abs(lines(Path(run.run.proj_dir) / "metrics.jsonl")[0]["margin"]) < 1e-5
    elsewhere = changed(run, proj_dir=str(tmp_path / "elsewhere"), allow_reference_mismatch=True)
    train(elsewhere, {})
    assert abs(lines(tmp_path / "elsewhere" / "metrics.jsonl")[0]["margin"]) > 1e-4  # which is why it is refused
