"""One entry of a `.save`: a pair as the file holds it, and the checks of foreign ones. Messages count pairs from 1."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.console import short
from src.data.token_lists import EMPTY
from src.errors import UserError


class Pair(NamedTuple):
    """A prompt, two answers and their references. With one answer empty it is a thumb: up without reject, down without chosen.

    A reference is the summed log-probability, in nats, of an answer's tokens that have a loss, given all before them under the
    base model.
    """

    prompt: list[int]
    chosen: list[int]
    reject: list[int]
    chosen_base_prob: float
    reject_base_prob: float
    chosen_from: int = 0  # tokens of chosen before this one have no loss
    reject_from: int = 0
    kl: Sequence[int] = ()  # KTO's: an answer to another prompt; empty for none
    kl_base_prob: float = 0.0  # its log-probability given this prompt
    kl_from: int = 0


class Numbered(NamedTuple):
    """A pair with the numbers of its lists of tokens in their place (`SharedLists`)."""

    prompt: int
    chosen: int
    reject: int
    chosen_base_prob: float
    reject_base_prob: float
    chosen_from: int = 0
    reject_from: int = 0
    kl: int = EMPTY
    kl_base_prob: float = 0.0
    kl_from: int = 0


PARTS = Pair._fields[:5]
MORE = Pair._fields[5:]  # what a sixth entry, a dict, may hold
REFERENCES = (*PARTS[3:], "kl_base_prob")
# The range of a sum of log-probabilities, in nats: at most 0, up to rounding, and above the point where float32, which losses
# are computed in, no longer resolves one nat.
OVER_ZERO, LOWEST = 1e-3, -2.0 ** 24
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_log_prob(values: Any) -> Any:
    """Whether this can be an answer's summed log-probability, in nats; of a number or an array."""
    return (values > LOWEST) & (values <= OVER_ZERO)


def read_entry(entry: Any, number: int, path: Path, add: Callable[[Any, str], tuple[int, int]]) -> Numbered:
    """A checked pair. Raises UserError for a malformed one.

    Args:
        add: stores a list of tokens, given with its name, and returns its number and its length.
    """
    if not isinstance(entry, (list, tuple)) or len(entry) not in (len(PARTS), len(PARTS) + 1):
        what = f"{len(entry)} entries" if isinstance(entry, (list, tuple)) else f"a {type(entry).__name__}"
        raise UserError(f"{path}: pair {number} is {what} where {len(PARTS)} are expected: {', '.join(PARTS)}")
    (prompt, _), (chosen, n_chosen), (reject, n_reject) = (add(*part) for part in zip(entry, PARTS[:3], strict=False))
    of_chosen, of_reject = (_checked_reference(entry[at], PARTS[at], number, path) for at in (3, 4))
    pair = Numbered(prompt, chosen, reject, of_chosen, of_reject)
    if len(entry) == len(PARTS):
        return pair
    more = _checked_names(entry[5], number, path)
    kl, n_kl = add(more["kl"], "kl") if "kl" in more else (EMPTY, 0)
    for name in ("kl_base_prob", "kl_from"):
        if name in more and not n_kl:
            raise UserError(f"{path}: pair {number} has a {name} and no kl that it belongs to")
    starts = {f"{name}_from": _checked_start(more.get(f"{name}_from", 0), name, length, number, path)
              for name, length in (("chosen", n_chosen), ("reject", n_reject), ("kl", n_kl))}
    kl_base_prob = _checked_reference(more.get("kl_base_prob", 0.0), "kl_base_prob", number, path)
    return pair._replace(kl=kl, kl_base_prob=kl_base_prob, **starts)


def _checked_names(more: Any, number: int, path: Path) -> dict[str, Any]:
    if not isinstance(more, dict):
        raise UserError(f"{path}: the sixth entry of pair {number} is a {type(more).__name__} where a dict is expected")
    for name in more:
        if not isinstance(name, str) or name not in MORE:
            what = repr(short(name)) if isinstance(name, str) else f"a {type(name).__name__}"
            raise UserError(f"{path}: the sixth entry of pair {number} has the unknown name {what}; known are {', '.join(MORE)}")
    return more


def _checked_start(value: Any, name: str, length: int, number: int, path: Path) -> int:
    where = f"{path}: {name}_from of pair {number}"
    if type(value) is not int:
        raise UserError(f"{where} is a {type(value).__name__} where a whole number is expected")
    if not 0 <= value < max(length, 1):
        raise UserError(f"{where} is {_shown(value)}, which is not within the {length} tokens of its {name}")
    return value


def checked_tokens(tokens: Any, name: str, vocab_size: int, number: int, path: Path) -> list[int]:
    """A list of tokens. Raises UserError if that is not what it is."""
    where = f"{path}: the {name} of pair {number}"
    if isinstance(tokens, Tensor):
        if tokens.dim() != 1 or tokens.dtype not in _INTEGERS:
            raise UserError(f"{where} is a tensor of shape {tuple(tokens.shape)} and {tokens.dtype} where token ids are expected")
        tokens = tokens.tolist()
    elif not isinstance(tokens, (list, tuple)):
        raise UserError(f"{where} is a {type(tokens).__name__} where a list of token ids is expected")
    kinds = {kind.__name__ for kind in set(map(type, tokens)) - {int}}
    if kinds:
        raise UserError(f"{where} holds a {min(kinds)} where token ids are expected")
    if tokens and min(tokens) < 0:
        raise UserError(f"{path}: token id {_shown(min(tokens))} in pair {number} is negative")
    if tokens and max(tokens) >= vocab_size:
        raise UserError(f"{path}: token id {_shown(max(tokens))} in pair {number} is beyond the vocabulary of {vocab_size}; "
                        "the file was made with another tokenizer than the model's")
    return list(tokens)


def _checked_reference(value: Any, name: str, number: int, path: Path) -> float:
    where = f"{path}: {name} of pair {number}"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UserError(f"{where} is a tensor of shape {tuple(value.shape)} where one number is expected")
        value = value.item()
    if type(value) not in (int, float):
        raise UserError(f"{where} is a {type(value).__name__} where a number is expected")
    if not abs(value) <= torch.finfo(torch.float32).max:  # false for nan, and right for an int beyond all floats
        raise UserError(f"{where} is not a finite number of float32; make the file again with rlhf_dpo_generate_save.py")
    return float(value)


def _shown(number: int) -> str:
    """Python refuses to print numbers of thousands of digits."""
    return str(number) if abs(number) < 2 ** 63 else f"of {number.bit_length()} bits"
