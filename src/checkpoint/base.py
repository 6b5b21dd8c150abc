"""A base model as every script opens it: loaded, recognized, checked."""

from pathlib import Path

from torch import Tensor

from src.checkpoint.dimensions import Dimensions, check_weights, read_dimensions
from src.checkpoint.io import load_checkpoint


def load_base(path: str | Path) -> tuple[dict[str, Tensor], Dimensions]:
    """The tensors of an official RWKV v6 or v7 checkpoint, on the CPU, and its dimensions.

    Raises:
        UserError: it can't be read, is of another architecture, or a tensor is missing or of the wrong shape.
    """
    weights = load_checkpoint(path)
    dimensions = read_dimensions(weights, str(path))
    check_weights(weights, dimensions, str(path))
    return weights, dimensions
