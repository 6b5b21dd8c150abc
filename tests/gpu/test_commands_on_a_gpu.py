"""The five commands one after the other, as a user types them on a machine with a GPU."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.checkpoint.io import load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("version", "strategy", "flags"), [
    ("x070", "cuda bf16", ()),
    ("x060", "cuda bf16nf4", ("--quant", "1", "--quant_mode", "nf4", "--grad_cp", "1")),
])
def test_from_prompts_to_a_merged_model(material, tmp_path, version, strategy, flags):
    model, prompts, pairs = str(material / f"{version}.pth"), material / "pairs.csv", tmp_path / "pairs.csv"

    def run(script: str, **options: object) -> None:
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        done = subprocess.run([sys.executable, script, *words, *(flags if script == "train.py" else ())], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    run("rlhf_generate_reject_csv.py", load_model=model, input_csv=prompts, output_csv=pairs, strategy=strategy, max_tokens=20,
        overwrite=1)
    with pairs.open(encoding="utf-8", newline="") as file:
        assert all(row["reject"] for row in csv.DictReader(file))
    run("rlhf_dpo_generate_save.py", load_model=model, input_csv=pairs, output_save=tmp_path / "pairs.save", strategy=strategy)
    run("train.py", load_model=model, rlhf_train_file=tmp_path / "pairs.save", proj_dir=tmp_path / "run", accelerator="gpu",
        precision="bf16", dpo=1, epoch_steps=4, epoch_count=1, micro_bsz=2, lr_init=1e-3, lr_final=1e-4)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4 and abs(metrics[0]["margin"]) < 0.05
    adapter, merged = tmp_path / "run" / "rwkv-final.safetensors", tmp_path / "merged.pth"
    run("merge.py", base=model, adapter=adapter, output=merged)
    assert load_checkpoint(merged).keys() == load_checkpoint(model).keys()
    run("evaluate.py", load_model=merged, pairs=tmp_path / "pairs.save", strategy="cuda bf16",
        output_json=tmp_path / "found.json")
    assert 0 <= json.loads((tmp_path / "found.json").read_text())["accuracy"] <= 1
