"""How much memory and time do files of many rows take, from the file to tokens?

    python benchmarks/large_files.py [--rows 300000] [--formats csv jsonl ...] [--stages read check pairs texts reject]

Makes a file of each format in a temporary folder: rows of three texts, 300 to 600 bytes together. Each stage runs in a process of
its own: `read` gives rows, `check` is `rlhf_dpo_generate_save.py --check_data 1 --tokenizer world`, `pairs` tokenizes pairs and
`texts` prompts with answers, as `--sft 1` does, and `reject` is `rlhf_generate_reject_csv.py` with a tiny model and answers
of one token. Prints seconds and peak memory, that of the imports alone first, and writes benchmarks/results/large_files.json.
"""

import argparse
import gzip
import io
import json
import os
import platform
import random
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

FORMATS = ("csv", "jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "arrow")
STAGES = ("imports", "read", "check", "pairs", "texts", "reject")
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
        for ending in options.formats:
            path = Path(folder, f"rows.{ending}")
            write(path, options.rows)
            print(f"{path.name}: {options.rows} rows, {path.stat().st_size / 1e6:.0f} MB")
            for stage in options.stages:
                found.append({"format": ending, "rows": options.rows, "bytes": path.stat().st_size, "stage": stage,
                              **measured(stage, path)})
                print(f"    {stage:8} {found[-1]['seconds']:7.1f} s {found[-1]['peak_mb']:7.0f} MB", flush=True)
            path.unlink()
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
        is_list = path.suffix == ".json"
        file.write("[" * is_list)
        for number, row in enumerate(rows(count)):
            file.write((", " * (number > 0) if is_list else "") + json.dumps(row, ensure_ascii=False) + "\n" * (not is_list))
        file.write("]" * is_list)


def measured(stage: str, path: Path) -> dict[str, float]:
    """Seconds and peak memory in MB of a stage in a process of its own."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, __file__, "--child", stage, str(path)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{stage} of {path.name} failed")
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
    elif stage == "reject":
        write_rejects(path)


def write_rejects(path: str) -> None:
    from rlhf_generate_reject_csv import main as generate
    from src.checkpoint.io import save_checkpoint
    from tests.random_checkpoint import make_dimensions, random_weights

    memory = Path("/dev/shm")  # each row waits until it is on disk, which is not the question here
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        model, output = f"{folder}/tiny.pth", f"{folder}/output.csv"
        save_checkpoint(random_weights(make_dimensions("x070", 1, 64, 64, 256)), model)
        generate(["--load_model", model, "--input_csv", path, "--output_csv", output, "--overwrite", "1", "--max_tokens", "1",
                  "--strategy", "cpu fp32"])


if __name__ == "__main__":
    main()
