"""What several test folders share."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from src.checkpoint.io import save_checkpoint
from src.checkpoint.random import random_weights
from tests.tiny import tiny_dimensions, trained_tiny


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory) -> Callable[[str, str, int], Path]:
    """`tiny_checkpoints(version, kind, head_size)`: path of a float32 `.pth`, kind "random" or "trained", made at first use."""
    folder = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def checkpoint(version: str, kind: str, head_size: int) -> Path:
        path = folder / f"{version}_{kind}_{head_size}.pth"
        weights = trained_tiny(version, head_size) if kind == "trained" else random_weights(tiny_dimensions(version, head_size))
        save_checkpoint(weights, path)
        return path

    return checkpoint
