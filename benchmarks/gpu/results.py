"""Results of runs on a GPU: a file for each benchmark, to which runs on the same machine add."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from src.files import atomic_write  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def read_results(name: str, machine: Any) -> dict[str, Any]:
    """What results/NAME_gpu.json holds of this machine; of another one nothing stays."""
    path = RESULTS / f"{name}_gpu.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("machine") == machine else {"machine": machine}


def write_results(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with atomic_write(RESULTS / f"{name}_gpu.json", "w", encoding="utf-8") as file:
        json.dump(found, file, indent=2)
