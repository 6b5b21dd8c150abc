"""Imports of src/ point downwards only: from a room to those below it, and to the files that all share."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[1] / "src"
# From the top down.
ROOMS = ("cli", "training", "evaluation", "generation", "preference", "data", "model", "adapters", "quantization", "wkv",
         "kernels", "checkpoint", "tokenizer")


def imported(path: Path) -> set[str]:
    """What a file imports of src, as the parts of src's own modules: {"data", "errors"}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "src":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("src."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("src.")}
    return names


def test_every_room_is_in_the_list():
    assert {path.name for path in SRC.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_below(room):
    allowed = {*ROOMS[ROOMS.index(room):], *(path.stem for path in SRC.glob("*.py"))}
    wrong = {str(path.relative_to(SRC)): sorted(more) for path in (SRC / room).rglob("*.py")
             if (more := imported(path) - allowed)}
    assert not wrong


def test_what_all_share_imports_no_room():
    assert {path.name: found for path in SRC.glob("*.py") if (found := imported(path) & set(ROOMS))} == {}
