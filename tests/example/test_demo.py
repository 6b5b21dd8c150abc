"""`make demo`, whole: the three scripts on the embedded example, then what came of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_learns_the_preference_and_shows_it():
    done = subprocess.run([sys.executable, "example/DPO/demo.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output = ROOT / "example" / "DPO" / "demo_output"
    evaluations = [json.loads(line) for line in (output / "run" / "eval.jsonl").read_text().splitlines()]
    assert evaluations[0]["accuracy"] == 0.5 and evaluations[-1]["accuracy"] > 0.9
    assert "tuned model" in done.stdout and (output / "run" / "report.html").exists() and (output / "merged.pth").exists()
