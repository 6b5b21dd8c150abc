"""A DeepSpeed run of two processes that is broken off, and what each of them holds."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.distributed.test_steps import DEEPSPEED, run


@pytest.mark.slow
def test_a_finished_run_gets_back_its_last_files(material, prepared, tmp_path):
    flags = dict(load_model=material / "x070.pth", rlhf_train_file=prepared("x070"), epoch_steps=2, peft="lora", lr_init=1e-3)
    whole = run(tmp_path / "whole", DEEPSPEED, "deepspeed_stage_2", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for name in ("rwkv-final.safetensors", "report.html"):
        (tmp_path / "broken" / name).unlink()
    (tmp_path / "broken" / "last.ckpt").rename(tmp_path / "broken" / ".last.ckpt.tmp")
    again = run(tmp_path / "broken", DEEPSPEED, "deepspeed_stage_2", **flags, resume=1)
    assert again == whole and json.loads((tmp_path / "broken" / "last.ckpt" / "manifest.json").read_text())["record"]["step"] == 1
    assert (tmp_path / "broken" / "report.html").exists()
    adapters = [(tmp_path / name / "rwkv-final.safetensors").read_bytes() for name in ("whole", "broken")]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_where_each_process_holds_a_part_the_adapters_are_whole(material, prepared, tmp_path):
    run(tmp_path, DEEPSPEED, "deepspeed_stage_3", load_model=material / "x070.pth", rlhf_train_file=prepared("x070"),
        epoch_steps=2, peft="lora", lr_init=1e-3)
    first, final = (load_file(tmp_path / f"rwkv-{name}.safetensors") for name in ("1", "final"))
    assert all(tensor.numel() and tensor.equal(final[name]) for name, tensor in first.items())
