"""`make demo`: the three scripts in order on the embedded example, then what came of it.

Runs 1_generate_reject.sh, 2_prepare.sh and 3_train.sh, and prints held-out numbers before and after, a question answered by
both models, and the files written; of these run/report.html is the training on one page. Everything lands in
example/DPO/demo_output, which each run makes anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from src.files import atomic_write  # noqa: E402

OUTPUT = Path("example/DPO/demo_output")
STEPS = (("1_generate_reject.sh", "the base model writes the rejected answers"),
         ("2_prepare.sh", "tokens and cached references"),
         ("3_train.sh", "training, then the merge"))
ASKED = 3  # held-out questions shown with both models' answers


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.chdir(ROOT)
    console = Console()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    started = time.monotonic()
    for script, what in STEPS:
        console.rule(f"[bold]{script}[/bold]: {what}")
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run(["sh", f"example/DPO/{script}", str(OUTPUT)], env=environment, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    seconds = time.monotonic() - started

    held_out = [json.loads(line) for line in (OUTPUT / "run" / "eval.jsonl").read_text().splitlines()]
    with atomic_write(OUTPUT / "summary.json", "w", encoding="utf-8") as file:
        json.dump({"seconds": seconds, "before": held_out[0], "after": held_out[-1]}, file, indent=2)
    console.rule("[bold]held-out pairs[/bold], never trained on")
    console.print(numbers(held_out[0], held_out[-1]))
    console.rule("[bold]held-out questions[/bold], the likeliest answer")
    console.print(answers())
    console.rule("[bold]files[/bold]")
    console.print(files())
    console.print(f"{seconds:.0f} s")


def numbers(before: dict, after: dict) -> Table:
    table = Table("", "before", "after")
    for name, words in (("accuracy", "preference accuracy (margin > 0; ties count half)"), ("margin", "mean margin"),
                        ("policy_accuracy", "the model itself finds the good answer likelier"),
                        ("sft_loss", "nats a token of the good answers"),
                        ("reward_chosen", "reward, chosen"), ("reward_rejected", "reward, rejected")):
        shown = "{:.1%}" if "accuracy" in name else "{:+.3f}" if name != "sft_loss" else "{:.3f}"
        table.add_row(words, shown.format(before[name]), shown.format(after[name]))
    return table


def answers() -> Table:
    """The first held-out questions, answered greedily by the base and by the merged model."""
    from src.checkpoint.base import load_base
    from src.data.read import read_pairs
    from src.data.templates import CLASSIC, prompt_pieces, text_of
    from src.generation.greedy import likeliest_answers
    from src.model import build_model
    from src.tokenizer import load_tokenizer

    rows = read_pairs("example/DPO/input_csv/rlhf_example_heldout.csv", require_reject=False).rows[:ASKED]
    table = Table("question", "base model", "tuned model", "Python's documentation")
    written = []
    for path in ("example/DPO/base_model.pth", OUTPUT / "merged.pth"):
        weights, dimensions = load_base(path)
        tokenizer = load_tokenizer(None, dimensions.vocab_size)
        prompts = [tokenizer.encode(text_of(prompt_pieces(CLASSIC, row.prompt))) for row in rows]
        written.append(likeliest_answers(build_model(weights, dimensions), tokenizer, prompts, 160,
                                         CLASSIC.ending))
    for row, (before, _), (after, _) in zip(rows, *written, strict=True):
        table.add_row(row.prompt, before, after, row.chosen)
    return table


def files() -> Table:
    table = Table("in " + str(OUTPUT), "bytes", "what it is")
    for name, what in (("rlhf_example_dataset_withreject.csv", "pairs with the model's own rejects"),
                       ("rlhf_example_dataset.save", "tokens and references"),
                       ("run/report.html", "the run on one page, for a browser: curves, settings, answers before and after"),
                       ("run/metrics.jsonl", "a line for each optimizer step"),
                       ("run/eval.jsonl", "held-out numbers after each epoch"),
                       ("run/curves.png", "picture: pref-percentage, losses, rewards"),
                       ("run/rwkv-final.safetensors", "the adapter"),
                       ("merged.pth", "the tuned model, for every RWKV runtime"),
                       ("summary.json", "the numbers above")):
        table.add_row(name, f"{(OUTPUT / name).stat().st_size:,}", what)
    return table


if __name__ == "__main__":
    main()
