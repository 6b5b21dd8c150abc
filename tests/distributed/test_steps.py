"""Optimizer steps of two processes, accumulated and left over, against one big batch in float64."""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from src.data.examples import read_texts
from src.data.packing import packed_length
from src.tokenizer import load_tokenizer
from src.training.schedule import learning_rate
from tests.training.exact import ALPHA, BETA, Exact, save_pairs
from tests.training.outside import lines
from tests.training.plain_thumbs import FLAGS, Thumb, save_thumbs, step_of
from tests.training.test_accumulation import CLOSE

ROOT = Path(__file__).parents[2]
DEEPSPEED = str(Path(__file__).parent / "deepspeed_on_cpu.py")
PAIRS = 9
HUNG = 900.0  # seconds after which a run will not end any more, however busy the machine


def run(folder: Path, *script: str, **flags) -> list[dict]:
    """metrics.jsonl of two processes with micro-batches of one, three of each to an optimizer step; weights stay as they are."""
    flags = {"proj_dir": folder, "accelerator": "cpu", "devices": 2, "precision": "fp32", "ctx_len": 512, "samples": 0,
             "peft": "full", "lr_init": 1e-9, "lr_final": 1e-10, "gradient_clip_val": 0, "epoch_steps": 0, "micro_bsz": 1,
             "accumulate_grad_batches": 3} | flags
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run([sys.executable, *script, *words], cwd=ROOT, capture_output=True, text=True, timeout=HUNG,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return lines(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def nine(material, prepared, tmp_path_factory):
    """The file of the pairs, them, and loss and gradient of each."""
    path = save_pairs(prepared("x070"), tmp_path_factory.mktemp("nine") / "pairs.save", PAIRS)
    exact, pairs = Exact(material / "x070.pth"), torch.load(path, weights_only=True)
    return path, pairs, [exact.pair(pair) for pair in pairs]


@pytest.mark.parametrize("script", [
    ("train.py",), (DEEPSPEED, "deepspeed_stage_2"), pytest.param((DEEPSPEED, "deepspeed_stage_1"), marks=pytest.mark.slow),
], ids=lambda script: script[-1])
def test_steps_of_pairs(material, nine, tmp_path, script):
    """An epoch is a step of six pairs and one of the three left, where the second process has but one: no repeat may count."""
    path, pairs, alone = nine
    metrics = run(tmp_path / "run", *script, load_model=material / "x070.pth", rlhf_train_file=path, dpo_beta=BETA,
                  dpo_alpha=ALPHA, epoch_count=2, grad_cp=1)
    assert [line["lr"] for line in metrics] == pytest.approx([learning_rate(step, 4, 0, 1e-9, 1e-10) for step in range(4)])

    def is_mean_over(line: dict, some: tuple[int, ...]) -> bool:
        loss = sum(alone[number][0] for number in some) / len(some)
        norm = sum(alone[number][1] for number in some).norm().item() / len(some)
        # Margins are of the base's log-probabilities, from which the references were moved.
        margins = [BETA * (3 - 3 * number) for number in some]
        return (line["grad_norm"] == pytest.approx(norm, rel=CLOSE) and line["loss"] == pytest.approx(loss, rel=1e-5)
                and line["margin"] == pytest.approx(sum(margins) / len(some), abs=1e-4)
                and (1 in some or line["pref_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(some))))

    for first, last in (metrics[:2], metrics[2:]):
        left, = (left for left in combinations(range(PAIRS), 3) if is_mean_over(last, left))
        assert is_mean_over(first, tuple(set(range(PAIRS)) - set(left)))
        seconds = last["elapsed_s"] - first["elapsed_s"]
        assert last["pairs_per_s"] * seconds == pytest.approx(3)
        assert last["tokens_per_s"] * seconds == pytest.approx(sum(packed_length(pairs[number]) for number in left))


@pytest.mark.parametrize("script", [("train.py",), (DEEPSPEED, "deepspeed_stage_2")], ids=lambda script: script[-1])
def test_steps_of_thumbs_share_their_kl(material, tmp_path, script):
    """The mean log-ratio of the mismatched answers is over both processes, and no repeated thumb counts."""
    exact = Exact(material / "x070.pth")
    thumbs = [Thumb(exact, thumb) for thumb in save_thumbs(exact, tmp_path / "thumbs.save", PAIRS)]
    metrics = run(tmp_path / "run", *script, load_model=material / "x070.pth", rlhf_train_file=tmp_path / "thumbs.save",
                  epoch_count=1, **FLAGS)
    assert len(metrics) == 2

    def is_of(line: dict, some: tuple[int, ...]) -> bool:
        return line == pytest.approx(line | step_of([thumbs[number] for number in some])[0], rel=CLOSE, abs=1e-5)

    left, = (left for left in combinations(range(PAIRS), 3) if is_of(metrics[1], left))
    assert is_of(metrics[0], tuple(set(range(PAIRS)) - set(left)))


def test_a_step_of_texts_is_the_mean_over_the_tokens_of_all_processes(material, tmp_path):
    rows = [{"prompt": "Count.", "completion": "One, two, three. " * (1 + 2 * n)} for n in range(3)]
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    line, = run(tmp_path / "run", "train.py", load_model=material / "x060.pth", sft=1, train_data_file=data)
    exact = Exact(material / "x060.pth")
    texts, _ = read_texts(data, load_tokenizer("bytes"), 512, 0, False)
    totals, gradients, counts = zip(*(exact.text(*text) for text in texts), strict=True)
    assert line["loss"] == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(sum(gradients).norm().item() / sum(counts), rel=CLOSE)
