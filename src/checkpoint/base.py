"""A base model as every script opens it: loaded, recognized, checked."""

from pathlib import Path

from torch import Tensor

from src.checkpoint.dimensions import Dimensions, check_weights, read_dimensions
from src.checkpoint.io import load_checkpoint, not_finite
from src.errors import NotFinite


def load_base(path: str | Path) -> tuple[dict[str, Tensor], Dimensions]:
    """The tensors of an official RWKV v6 or v7 checkpoint, on the CPU, and its dimensions.

    Raises:
        UserError: it can't be read, is of another architecture, or a tensor is missing or of the wrong shape.
        NotFinite: a tensor has NaN or infinity in it, of which only more could come.
    """
    weights = load_checkpoint(path)
    dimensions = read_dimensions(weights, str(path))
    check_weights(weights, dimensions, str(path))
    wrong = not_finite(weights)
    if wrong:
        raise NotFinite(f"{path}: {wrong} are not finite; get that checkpoint again")
    return weights, dimensions
