"""Preference training on human preferences that nobody made for this project (read from ../shared where it exists)."""

import json
from pathlib import Path

import numpy as np
import pytest

from src.training.run import train
from tests.conftest import prepare_csv
from tests.data.reading import read_pairs
from tests.pairs_csv import write_pairs_csv
from tests.settings import changed

ROOT = Path(__file__).parents[2]
PAIRS = ROOT.parent / "shared" / "data" / "hh_harmless_pairs.csv"


@pytest.mark.skipif(not PAIRS.exists(), reason=f"{PAIRS} is not here")
@pytest.mark.slow
def test_a_run_on_human_preferences_raises_held_out_accuracy(config, tmp_path):
    """The embedded model on 800 pairs cut short, two passes; 400 held-out pairs have a standard error of 2.5 %."""
    rows = [row._replace(prompt=row.prompt[-80:].strip(), chosen=row.chosen[:120], reject=row.reject[:120])
            for row in read_pairs(PAIRS, require_reject=True)]
    order = np.random.default_rng(0).permutation(len(rows))
    base = ROOT / "example" / "DPO" / "base_model.pth"
    for part, chosen in (("train", order[:800]), ("held_out", order[800:1200])):
        write_pairs_csv(tmp_path / f"{part}.csv", [rows[index] for index in chosen])
        prepare_csv(base, tmp_path / f"{part}.csv", tmp_path / f"{part}.save")
    run = config(load_model=str(base), rlhf_train_file=str(tmp_path / "train.save"), eval_file=str(tmp_path / "held_out.save"))
    train(changed(run, lora_r=16, lora_alpha=32.0, lr_init=1e-3, lr_final=1e-5, epoch_steps=100, epoch_count=2, micro_bsz=8), {})
    before, *_, after = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert before["accuracy"] == 0.5 and abs(before["margin"]) < 1e-4
    assert after["accuracy"] > 0.5 + 0.025
    assert after["margin"] > 0
