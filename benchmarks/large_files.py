"""How much memory and time do files of many rows take, from the file to training?

    python benchmarks/large_files.py [--rows 300000] [--formats csv jsonl ...] [--stages read check pairs texts prepare ...]

Makes a file of each format in a temporary folder: rows of three texts, 300 to 600 bytes together. Each stage runs in a process of
its own: `read` gives rows, `check` is `rlhf_dpo_generate_save.py --check_data 1 --tokenizer world`, `pairs` tokenizes pairs and
`texts` prompts with answers, as `--sft 1` does. The stages that follow are whole scripts with a model of a few thousand weights:
`reject` writes answers of one token, `prepare` makes a .save with references, `train` takes four steps on it and `evaluate`
measures all of it; `sft` takes four steps on the file itself. Prints seconds and peak memory, that of the imports alone first,
and writes benchmarks/results/large_files.json.
"""

import argparse
import gzip
import io
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY = 512
FORMATS = ("csv", "jsonl", "json", "columns.json", "jsonl.gz", "jsonl.zst", "parquet", "arrow")
MODEL = ("--load_model", "{folder}/model.pth")
TOKENIZER = ("--tokenizer", "{folder}/tokenizer.json")
STEPS = ("--epoch_steps", "4", "--epoch_count", "1", "--batch_tokens", "4096")
SCRIPTS = {
    "reject": ("rlhf_generate_reject_csv.py", "--input_csv", "{path}", "--output_csv", "{folder}/rejects.csv", "--overwrite", "1",
               "--max_tokens", "1", *TOKENIZER, "--strategy", "cpu fp32"),
    "prepare": ("rlhf_dpo_generate_save.py", "--input_csv", "{path}", "--output_save", "{folder}/made.save", *TOKENIZER,
                "--strategy", "cpu fp32"),
    "train": ("train.py", "--rlhf_train_file", "{folder}/made.save", "--proj_dir", "{folder}/run", *STEPS),
    "evaluate": ("evaluate.py", "--pairs", "{folder}/made.save", "--strategy", "cpu fp32"),
    "sft": ("train.py", "--sft", "1", "--train_data_file", "{path}", "--proj_dir", "{folder}/sft", *STEPS, *TOKENIZER),
}
STAGES = ("imports", "read", "check", "pairs", "texts", *SCRIPTS)
IN_GROUP = 20_000  # rows of a row group
WORDS = ("the", "of", "model", "answer", "a", "question", "with", "state", "river", "and", "more", "Zürich", "42", "recurrent",
         "is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=("csv", "parquet"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=("imports", "read", "check", "texts"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(*options.child)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for ending in options.formats:
            path = Path(folder, f"rows.{ending}")
            write(path, options.rows)
            print(f"{path.name}: {options.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
            for stage in sorted(options.stages, key=STAGES.index):  # training needs what preparing makes
                found.append({"format": ending, "rows": options.rows, "bytes": path.stat().st_size, "stage": stage,
                              **measured(stage, path)})
                print(f"    {stage:8} {found[-1]['seconds']:7.1f} s {found[-1]['peak_mb']:7.0f} MB", flush=True)
            path.unlink()
            for made in ("run", "sft"):
                shutil.rmtree(Path(folder, made), ignore_errors=True)
            for made in Path(folder).glob("rejects.csv*"):
                made.unlink()
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(), "measured": found}
    (results / "large_files.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def rows(count: int) -> Iterator[dict[str, str]]:
    words = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(words.choices(WORDS, k=words.randint(low, high)))

    for number in range(count):
        yield {"prompt": f"{number}: {text(10, 30)}?", "chosen": f"{text(20, 35)},\n\"{text(1, 5)}\".", "reject": text(15, 30)}


def write_model(folder: Path) -> None:
    """A model of one block, and a tokenizer of its vocabulary that knows the rows' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from src.checkpoint.io import save_checkpoint
    from tests.random_checkpoint import make_dimensions, random_weights

    save_checkpoint(random_weights(make_dimensions("x070", 1, 32, 16, VOCABULARY)), folder / "model.pth")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((row["chosen"] for row in rows(1000)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write(path: Path, count: int) -> None:
    import pyarrow
    import pyarrow.parquet

    if path.suffix in (".parquet", ".arrow"):
        schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "chosen", "reject")])
        new: Callable = pyarrow.parquet.ParquetWriter if path.suffix == ".parquet" else pyarrow.ipc.new_file
        some: list[dict[str, str]] = []
        with new(str(path), schema) as writer:
            for row in rows(count):
                some.append(row)
                if len(some) == IN_GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(some, schema))
                    some.clear()
            writer.write_table(pyarrow.Table.from_pylist(some, schema))
        return
    import csv

    open_file: Callable[[], Any] = {
        ".gz": partial(gzip.open, path, "wb", compresslevel=1),
        ".zst": partial(pyarrow.output_stream, str(path), compression="zstd")}.get(path.suffix, partial(path.open, "wb"))
    with io.TextIOWrapper(open_file(), "utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ("prompt", "chosen", "reject"))
            writer.writeheader()
            writer.writerows(rows(count))
            return
        if path.suffixes == [".columns", ".json"]:
            for column in ("prompt", "chosen", "reject"):
                file.write(f'{"{" if column == "prompt" else "], "}"{column}": [')
                for number, row in enumerate(rows(count)):
                    file.write(", " * (number > 0) + json.dumps(row[column], ensure_ascii=False))
            file.write("]}")
            return
        is_list = path.suffix == ".json"
        file.write("[" * is_list)
        for number, row in enumerate(rows(count)):
            file.write((", " * (number > 0) if is_list else "") + json.dumps(row, ensure_ascii=False) + "\n" * (not is_list))
        file.write("]" * is_list)


def measured(stage: str, path: Path) -> dict[str, float]:
    """Seconds and peak memory in MB of a stage in a process of its own."""
    command = [__file__, "--child", stage, str(path)]
    if stage in SCRIPTS:
        script, *flags = (word.format(folder=path.parent, path=path) for word in (*SCRIPTS[stage], *MODEL))
        command = [str(ROOT / script), *flags]
    started = time.monotonic()
    with (path.parent / "log.txt").open("w+") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        log.seek(0)
        if status:
            raise SystemExit(f"{stage} of {path.name} failed: {log.read()[-500:]}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_mb": round(used.ru_maxrss / 1024, 0)}


def run(stage: str, path: str) -> None:
    import src.preference.prepare  # noqa: F401  # as the script does
    from rlhf_dpo_generate_save import main as prepare
    from src.data.examples import read_texts
    from src.data.fit import fitted
    from src.data.read import read_pairs
    from src.data.templates import CLASSIC
    from src.data.tokenize import tokenize_pairs
    from src.tokenizer import load_tokenizer

    if stage == "read":
        read_pairs(path, require_reject=True)
    elif stage == "check":
        prepare(["--input_csv", path, "--check_data", "1", "--tokenizer", "world"])
    elif stage == "pairs":
        reading = fitted(read_pairs(path, require_reject=True), CLASSIC)
        tokenize_pairs(reading.rows, load_tokenizer("world"), None, 512, 0, reading.numbers)
    elif stage == "texts":
        read_texts(path, load_tokenizer("world"), 512, 0, on_prompt=False)


if __name__ == "__main__":
    main()
