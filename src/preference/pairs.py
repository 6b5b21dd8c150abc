"""The `.save` file: token pairs with their cached reference log-probabilities, and its sidecar.

`NAME.save` is `torch.save` of a list of `Pair`. `NAME.save.json` says how the references were made, how many
pairs there are, and the sha256 of the `.save` that it belongs to, so that the two can't be mixed up. Files
written by RWKV-LM-RLHF have no sidecar and are read all the same. Messages count pairs from 1.
"""

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.checked_json import BadJson, parse_json
from src.checkpoint.archive import Described, read_content
from src.checkpoint.io import write_archive
from src.checkpoint.pickled import BadPickle, NamesCode, NotSupported
from src.console import short
from src.data.load_template import RECORDED
from src.errors import UserError, out_of_memory
from src.files import atomic_write, existing_file, json_text

# prompt_tokens, chosen_tokens, reject_tokens, then the summed log-probability, in nats, of each answer's tokens
# given all before them under the base model: chosen_base_prob, reject_base_prob.
Pair = tuple[list[int], list[int], list[int], float, float]

_PARTS = ("prompt", "chosen", "reject", "chosen_base_prob", "reject_base_prob")
# A sidecar's fields, including those of older versions; other fields are accepted.
_SIDECAR = {
    "sha256": str, "count?": int, "base_model?": str, "base_fingerprint?": str, "version?": str, "tokenizer?": str,
    "template?": RECORDED, "loss_on?": str,
    "templates?": {str: int}, "seed?": int, "max_len?": int, "cut?": int, "dropped?": int, "changed_texts?": int,
    "skipped_rows?": {"count": int, "rows": {str: [int]}}, "references?": bool, "precision?": str, "quantization?": (str, None),
    "unquantized_blocks?": [int], "quantized_otherwise?": {str: str},
}
# The range of a sum of log-probabilities, in nats: at most 0, up to rounding, and above the point where float32, which losses
# are computed in, no longer resolves one nat.
_OVER_ZERO, _LOWEST = 1e-3, -2.0 ** 24
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def save_pairs(path: str | Path, pairs: Sequence[Pair], sidecar: dict[str, Any]) -> None:
    """Write `path` and `path` + ".json", the sidecar with `count` and `sha256` added.

    The same pairs give the same bytes. Both files are written in full before either takes its name, so that a
    full disk leaves the old two untouched. A crash between the two renames leaves a sidecar whose sha256 does not
    match, which `load_pairs` refuses.

    Raises UserError if writing fails.
    """
    # Through memory: torch's own file writer turns a full disk into a RuntimeError that names no file.
    buffer = io.BytesIO()
    write_archive(list(pairs), buffer)
    sidecar = sidecar | {"count": len(pairs), "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest()}
    text = json_text(sidecar, _sidecar_path(path), indent=2, ensure_ascii=False)
    with atomic_write(_sidecar_path(path)) as sidecar_file, atomic_write(path) as file:
        sidecar_file.write(text.encode() + b"\n")
        sidecar_file.flush()
        file.write(buffer.getbuffer())


def check_sidecar_place(path: str | Path) -> None:
    """Raise UserError if the sidecar of a new `.save` would overwrite a file that is no sidecar."""
    sidecar = _sidecar_path(path)
    if sidecar.exists() and not Path(path).exists():
        try:
            parse_json(sidecar.read_bytes(), _SIDECAR)
        except (OSError, BadJson):
            raise UserError(f"{sidecar}: is no sidecar and would be overwritten; choose another --output_save, or remove "
                            "it") from None


def load_pairs(path: str | Path, vocab_size: int, max_len: int) -> tuple[list[Pair], dict[str, Any] | None, dict[str, int]]:
    """Read and check a `.save`; nothing in it is ever executed.

    Tokens may be lists, tuples or 1-D integer tensors, references numbers or tensors of one element; they are returned as lists
    of int and as floats. Equal token lists may be one object: treat them as read-only. References must be possible
    log-probabilities, unless none in the file is below 0, as in a file without references (see `has_references`).

    A pair with prompt + longer answer over `max_len` is left out, never cut, since its references were
    computed on the whole pair. So is a pair with an empty answer, which teaches nothing.

    Returns:
        the pairs; the sidecar, None where there is none; the number of pairs left out by reason, under
        "too_long" and "empty_answer".

    Raises:
        UserError: the file is missing, damaged, holds anything but lists, numbers and tensors, or has a malformed
            pair; the sidecar is damaged or belongs to another file; no pair is left.
    """
    path = existing_file(path, "pairs file")
    data = path.read_bytes()
    content = _content(data, path)
    if not isinstance(content, list):
        raise UserError(f"{path}: holds a {type(content).__name__} where a list of pairs is expected; is it a .save file?")
    if not content:
        raise UserError(f"{path}: holds no pairs")
    sidecar = _read_sidecar(path, data)

    pairs: list[Pair] = []
    left_out = {"too_long": 0, "empty_answer": 0}
    unlikely, is_free = None, True
    checked: dict[int, list[int]] = {}
    for number, entry in enumerate(content, start=1):
        if not isinstance(entry, (list, tuple)) or len(entry) != len(_PARTS):
            what = f"{len(entry)} entries" if isinstance(entry, (list, tuple)) else f"a {type(entry).__name__}"
            raise UserError(f"{path}: pair {number} is {what} where {len(_PARTS)} are expected: {', '.join(_PARTS)}")
        # Pairs made from the same row share their lists, and each list needs only one check; `content` keeps them
        # alive, so that an id identifies one list.
        for at, tokens in enumerate(entry[:3]):
            if id(tokens) not in checked:
                checked[id(tokens)] = _checked_tokens(tokens, at, vocab_size, number, path)
        prompt, chosen, reject = (checked[id(tokens)] for tokens in entry[:3])
        references = [_checked_reference(entry[at], at, number, path) for at in (3, 4)]
        is_free &= min(references) >= 0
        if unlikely is None and not all(map(is_log_prob, references)):
            at = [is_log_prob(value) for value in references].index(False)
            unlikely = f"{_PARTS[3 + at]} of pair {number} is {references[at]:g}"
        if not chosen or not reject:
            left_out["empty_answer"] += 1
        elif len(prompt) + max(len(chosen), len(reject)) > max_len:
            left_out["too_long"] += 1
        else:
            pairs.append((prompt, chosen, reject, references[0], references[1]))
    if unlikely and not is_free:
        raise UserError(f"{path}: {unlikely}, which no answer's log-probability can be (at most 0, and above {_LOWEST:.0f}); "
                        "make the file again with rlhf_dpo_generate_save.py")
    if not pairs:
        raise UserError(f"{path}: none of its {len(content)} pairs can be used: {left_out['too_long']} are longer than {max_len} "
                        f"tokens, {left_out['empty_answer']} have an empty answer; see --rlhf_max_corpus_len")
    return pairs, sidecar, left_out


def check_sidecar(sidecar: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The differences between how the references were made and how the run that uses them is set up.

    Args:
        sidecar: from `load_pairs`.
        expected: the run's values, in JSON's types and under the sidecar's names, such as base_fingerprint, tokenizer, precision,
            quantization, max_len, version. Call it separately for fatal differences and for others.

    Returns:
        one line for each difference, starting with its name; an empty list if all agree.
    """
    lines = []
    for name, value in expected.items():
        if name not in sidecar:
            lines.append(f"{name}: not recorded for the references, {_worded(value)} here")
        elif sidecar[name] != value:
            lines.append(f"{name}: {_worded(sidecar[name])} for the references, {_worded(value)} here")
    return lines


def has_references(pairs: Sequence[Pair], sidecar: dict[str, Any] | None) -> bool:
    """Whether the references were computed at all.

    `rlhf_dpo_generate_save.py --reference 0` computes none, stores 0.0 and says so in the sidecar. RWKV-LM-RLHF stores 0.5 for
    losses without a reference. Real references have some answer below 0.
    """
    if sidecar is not None and not sidecar.get("references", True):
        return False
    return any(min(pair[3:]) < 0 for pair in pairs)


def is_log_prob(value: float) -> bool:
    """Whether this can be an answer's summed log-probability, in nats."""
    return _LOWEST < value <= _OVER_ZERO


def _worded(value: Any) -> str:
    return "none" if value is None else short(str(value))


def _sidecar_path(path: str | Path) -> Path:
    return Path(f"{path}.json")


def _read_sidecar(path: Path, data: bytes) -> dict[str, Any] | None:
    sidecar_path = _sidecar_path(path)
    if not sidecar_path.exists():
        return None
    again = "run rlhf_dpo_generate_save.py again, or remove the sidecar to do without it"
    try:
        sidecar = parse_json(existing_file(sidecar_path, "sidecar").read_bytes(), _SIDECAR)
    except BadJson as error:
        raise UserError(f"{sidecar_path}: {error}; {again}") from None
    if sidecar["sha256"] != hashlib.sha256(data).hexdigest():
        raise UserError(f"{sidecar_path}: belongs to another {path.name} than the one next to it (the sha256 differs); {again}")
    # Older sidecars lack it: they are from before there were adapters that split weights.
    return {"quantized_otherwise": {}} | sidecar


def _content(data: bytes, path: Path) -> Any:
    """The file's content with its tensors loaded, all of them dense and on the CPU."""
    try:
        content = read_content(io.BytesIO(data), data)
        if any(tensor.dtype is None for tensor in content.tensors):
            raise UserError(f"{path}: {_place_of_other_form(content.value)} is a tensor in a form (sparse, quantized or without "
                            "data) that is not supported; a .save holds lists, numbers and plain tensors")
        if not content.tensors:
            return content.value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of older kinds of files
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except NamesCode as error:
        raise UserError(f"{path}: refused, since it names {error.name}; a .save holds only lists, numbers and tensors, "
                        "no numpy values and no code") from None
    except NotSupported as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # torch raises nearly anything on damaged bytes: KeyError, struct.error, RuntimeError, ...
        if out_of_memory(error):
            raise
        reason = f" ({error})" if isinstance(error, BadPickle) else ""
        raise UserError(f"{path}: cannot be read as a .save file{reason}; it is damaged or of another kind") from None


def _place_of_other_form(content: Any) -> str:
    for number, entry in enumerate(content if isinstance(content, list) else (), start=1):
        if isinstance(entry, (list, tuple)) and len(entry) == len(_PARTS):
            for part, value in zip(_PARTS, entry, strict=True):
                if isinstance(value, Described) and value.dtype is None:
                    return f"the {part} of pair {number}"
    return "something in it"


def _checked_tokens(tokens: Any, at: int, vocab_size: int, number: int, path: Path) -> list[int]:
    if isinstance(tokens, Tensor):
        if tokens.dim() != 1 or tokens.dtype not in _INTEGERS:
            raise UserError(f"{_where(path, at, number)} is a tensor of shape {tuple(tokens.shape)} and {tokens.dtype} where "
                            "token ids are expected")
        tokens = tokens.tolist()
    elif not isinstance(tokens, (list, tuple)):
        raise UserError(f"{_where(path, at, number)} is a {type(tokens).__name__} where a list of token ids is expected")
    kinds = {kind.__name__ for kind in set(map(type, tokens)) - {int}}
    if kinds:
        raise UserError(f"{_where(path, at, number)} holds a {min(kinds)} where token ids are expected")
    if tokens and min(tokens) < 0:
        raise UserError(f"{path}: token id {_short(min(tokens))} in pair {number} is negative")
    if tokens and max(tokens) >= vocab_size:
        raise UserError(f"{path}: token id {_short(max(tokens))} in pair {number} is beyond the vocabulary of {vocab_size}; "
                        "the file was made with another tokenizer than the model's")
    return tokens if isinstance(tokens, list) else list(tokens)


def _checked_reference(value: Any, at: int, number: int, path: Path) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UserError(f"{_where(path, at, number)} is a tensor of shape {tuple(value.shape)} where one number is expected")
        value = value.item()
    if type(value) not in (int, float):
        raise UserError(f"{_where(path, at, number)} is a {type(value).__name__} where a number is expected")
    if not abs(value) <= torch.finfo(torch.float32).max:  # false for nan, and right for an int beyond all floats
        raise UserError(f"{_where(path, at, number)} is not a finite number of float32; make the file again with "
                        "rlhf_dpo_generate_save.py")
    return float(value)


def _where(path: Path, at: int, number: int) -> str:
    return f"{path}: {'the ' if at < 3 else ''}{_PARTS[at]} of pair {number}"


def _short(token: int) -> str:
    """Python refuses to print numbers of thousands of digits."""
    return str(token) if abs(token) < 2 ** 63 else f"of {token.bit_length()} bits"
