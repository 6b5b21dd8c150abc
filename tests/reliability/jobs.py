"""One small job for each script, all that it leaves, and what of that must be equal byte for byte in two runs."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.checkpoint.io import save_checkpoint
from tests.random_checkpoint import make_dimensions, random_weights

# Of metrics.jsonl and of summaries; all else is equal however often a run was broken off.
TIMES = {"tokens_per_s", "pairs_per_s", "peak_memory_bytes", "elapsed_s", "seconds"}
ROWS = 10


class Job(NamedTuple):
    """A script with flags that work, writing below `out` alone."""

    script: str
    flags: dict[str, str]
    out: Path
    again: dict[str, str]  # more flags of the run that goes on after one that was broken off

    def words(self, **changes: str | None) -> list[str]:
        flags = self.flags | {f"--{name}": value for name, value in changes.items()}
        return [word for flag, value in flags.items() if value is not None for word in (flag, value)]

    def words_again(self) -> list[str]:
        return [*self.words(), *(word for pair in self.again.items() for word in pair)]


def make_inputs(folder: Path) -> Path:
    """base.pth, two layers 64 wide over bytes, and pairs.csv; returns the folder."""
    save_checkpoint(random_weights(make_dimensions("x070", 2, 64, 16, 256)), folder / "base.pth")
    lines = [f"What is {n} plus {n}?{' Think.' * (n % 3)},It is {2 * n}.,No idea{'!' * n}" for n in range(ROWS)]
    (folder / "pairs.csv").write_text("\n".join(["prompt,chosen,reject", *lines]) + "\n")
    return folder


def make_jobs(inputs: Path, out: Path) -> dict[str, Job]:
    """The five jobs by script. `pairs.save` and `adapter.safetensors` in `inputs` are what the second and third make."""
    base, csv = str(inputs / "base.pth"), str(inputs / "pairs.csv")
    save, adapter = str(inputs / "pairs.save"), str(inputs / "adapter.safetensors")
    flags: dict[str, dict[str, Any]] = {
        "rlhf_generate_reject_csv": {
            "--load_model": base, "--input_csv": csv, "--output_csv": out / "o.csv", "--strategy": "cpu fp32", "--max_tokens": 4,
            "--overwrite": 1, "--batch_size": 3},
        "rlhf_dpo_generate_save": {
            "--load_model": base, "--input_csv": csv, "--output_save": out / "o.save", "--strategy": "cpu fp32",
            "--rlhf_max_corpus_len": 512, "--batch_tokens": 256},
        "train": {
            "--load_model": base, "--rlhf_train_file": save, "--eval_file": save, "--proj_dir": out / "run",
            "--accelerator": "cpu", "--precision": "fp32", "--epoch_steps": 2, "--epoch_count": 2, "--ctx_len": 512,
            "--lora_r": 4, "--lr_init": 1e-3, "--samples": 1, "--sample_tokens": 4},
        "merge": {"--base": base, "--adapter": adapter, "--output": out / "o.pth"},
        "evaluate": {"--load_model": base, "--adapter": adapter, "--pairs": save, "--output_json": out / "o.json",
                     "--strategy": "cpu fp32"},
    }
    return {script: Job(script, {flag: str(value) for flag, value in given.items()}, out,
                        {"--resume": "1"} if script == "train" else {}) for script, given in flags.items()}


def earlier_result(job: Job) -> dict[Path, bytes]:
    """Put a complete file of an earlier run where the job will write its own; its bytes by path. Some jobs refuse one."""
    name = {"rlhf_dpo_generate_save": "o.save", "merge": "o.pth", "evaluate": "o.json"}.get(job.script)
    if name is None:
        return {}
    job.out.mkdir(exist_ok=True)
    (job.out / name).write_bytes(b"an earlier result\n" * 5)
    return {job.out / name: (job.out / name).read_bytes()}


def clear(job: Job) -> None:
    shutil.rmtree(job.out, ignore_errors=True)


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def artifacts(out: Path) -> dict[str, Any]:
    """What a finished job left, by name, without times: bytes, or what the bytes say where they hold times."""
    return {str(path.relative_to(out)): _content(path) for path in sorted(out.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        values.pop("summary", None)  # of the run that wrote the last rows; there is none if that was broken off behind them
        values.pop("resume", None)
        return _without_times(values)
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)
        parts = ("state_dict", "optimizer_states", "lr_schedulers", "random_state", "epoch", "global_step")
        return repr([state.get(part) for part in parts])
    if path.suffix in (".html", ".png"):  # times are in both
        data = path.read_bytes()
        return data.rstrip()[-7:] if path.suffix == ".html" else data[:8]
    return path.read_bytes()


def _without_times(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_times(value) for name, value in values.items() if name not in TIMES}
    return [_without_times(value) for value in values] if isinstance(values, list) else values
