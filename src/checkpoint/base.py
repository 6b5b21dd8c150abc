"""Opens a base model, for every script: loaded, recognized, checked."""

from pathlib import Path

from torch import Tensor

from src.checkpoint.dimensions import Dimensions, check_weights, read_dimensions
from src.checkpoint.io import fingerprint_if_finite, load_checkpoint, not_finite
from src.errors import NotFinite


def load_base(path: str | Path) -> tuple[dict[str, Tensor], Dimensions]:
    """The tensors of an official RWKV v6 or v7 checkpoint, on the CPU, and its dimensions.

    Raises:
        UserError: it can't be read, is of another architecture, or a tensor is missing or of the wrong shape.
        NotFinite: a tensor contains NaN or infinity, which would spread.
    """
    weights, dimensions = _load(path)
    if wrong := not_finite(weights):
        raise _not_finite(wrong, path)
    return weights, dimensions


def load_base_and_fingerprint(path: str | Path) -> tuple[dict[str, Tensor], Dimensions, str]:
    """`load_base`, and the fingerprint of the tensors, from one pass over them. Raises the same errors."""
    weights, dimensions = _load(path)
    fingerprint, wrong = fingerprint_if_finite(weights)
    if fingerprint is None:
        raise _not_finite(wrong, path)
    return weights, dimensions, fingerprint


def _load(path: str | Path) -> tuple[dict[str, Tensor], Dimensions]:
    weights = load_checkpoint(path)
    dimensions = read_dimensions(weights, str(path))
    check_weights(weights, dimensions, str(path))
    return weights, dimensions


def _not_finite(wrong: str | None, path: str | Path) -> NotFinite:
    return NotFinite(f"{path}: {wrong} are not finite; get that checkpoint again")
