"""train.py as a user sees it: flags and files in, files out."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import train


def run(folder: Path, flags: dict) -> tuple[list[dict], dict[str, Tensor]]:
    """Train into `folder` in this process: the lines of metrics.jsonl, and the tensors of the last adapter."""
    train.main([str(word) for name, value in flags.items() for word in (f"--{name}", value)] + ["--proj_dir", str(folder)])
    return lines(folder / "metrics.jsonl"), tensors(folder / "rwkv-final.safetensors")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)


def changed_adapter(source: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Write an adapter file like `source` with `change(name, tensor)` for each tensor that trains."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    content = {name: tensor if ".start_" in name else change(name, tensor) for name, tensor in tensors(source).items()}
    save_file(content, target, metadata)
    return content
