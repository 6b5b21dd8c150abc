"""The `.save` file: token pairs with their cached reference log-probabilities, and its sidecar.

`NAME.save` is `torch.save` of a list of tuples: a pair's prompt, chosen and reject tokens, its two references, and where it has
more, a dict of that (src/preference/entries.py). `NAME.save.json` says how the references were made, how many pairs there are,
and the sha256 of the `.save` that it belongs to, so that the two can't be mixed up. Files written by RWKV-LM-RLHF have no sidecar
and are read all the same. Messages count pairs from 1.
"""

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from src.checked_json import BadJson, parse_json
from src.checkpoint.archive import Described, read_content
from src.checkpoint.io import write_archive
from src.checkpoint.pickled import BadPickle, NamesCode, NotSupported
from src.console import short
from src.data.load_template import RECORDED
from src.errors import UserError, out_of_memory
from src.files import atomic_write, existing_file, json_text
from src.preference.entries import LOWEST, MORE, PARTS, Pair, as_entry, is_log_prob, read_entry, references_of

# A sidecar's fields, including those of older versions; other fields are accepted.
_SIDECAR = {
    "sha256": str, "count?": int, "base_model?": str, "base_fingerprint?": str, "version?": str, "tokenizer?": str,
    "template?": RECORDED, "loss_on?": str,
    "templates?": {str: int}, "seed?": int, "max_len?": int, "cut?": int, "dropped?": int, "changed_texts?": int,
    "skipped_rows?": {"count": int, "rows": {str: [int]}}, "references?": bool, "precision?": str, "quantization?": (str, None),
    "unquantized_blocks?": [int], "quantized_otherwise?": {str: str},
}


def save_pairs(path: str | Path, pairs: Sequence[Pair], sidecar: dict[str, Any]) -> None:
    """Write `path` and `path` + ".json", the sidecar with `count` and `sha256` added.

    The same pairs give the same bytes. Both files are written in full before either takes its name, so that a
    full disk leaves the old two untouched. A crash between the two renames leaves a sidecar whose sha256 does not
    match, which `load_pairs` refuses.

    Raises UserError if writing fails.
    """
    # Through memory: torch's own file writer turns a full disk into a RuntimeError that names no file.
    buffer = io.BytesIO()
    write_archive([as_entry(pair) for pair in pairs], buffer)
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


def load_pairs(path: str | Path, vocab_size: int, max_len: int,
               thumbs: bool = False) -> tuple[list[Pair], dict[str, Any] | None, dict[str, int]]:
    """Read and check a `.save`; nothing in it is ever executed.

    Tokens may be lists, tuples or 1-D integer tensors, references numbers or tensors of one element; they are returned as lists
    of int and as floats. Equal token lists may be one object: treat them as read-only. References must be possible
    log-probabilities, unless none in the file is below 0, as in a file without references (see `has_references`).

    A pair with prompt + longer answer over `max_len` is left out, never cut, since its references were
    computed on the whole pair; a mismatched completion for KTO counts as an answer here. A pair with two empty answers is left
    out too, and unless `thumbs` a pair with one, which has nothing to teach then.

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
    unlikely, is_free, n_thumbs = None, True, 0
    checked: dict[int, list[int]] = {}  # `content` keeps all lists alive, so that an id identifies one
    for number, entry in enumerate(content, start=1):
        pair = read_entry(entry, vocab_size, number, path, checked)
        references = references_of(pair)
        is_free &= min(references.values()) >= 0
        wrong = [name for name, value in references.items() if not is_log_prob(value)]
        if unlikely is None and wrong:
            unlikely = f"{wrong[0]} of pair {number} is {references[wrong[0]]:g}"
        is_thumb = bool(pair.chosen) != bool(pair.reject)
        n_thumbs += is_thumb
        if not (pair.chosen and pair.reject) and not (is_thumb and thumbs):
            left_out["empty_answer"] += 1
        elif len(pair.prompt) + max(len(pair.chosen), len(pair.reject), len(pair.kl)) > max_len:
            left_out["too_long"] += 1
        else:
            pairs.append(pair)
    if unlikely and not is_free:
        raise UserError(f"{path}: {unlikely}, which no answer's log-probability can be (at most 0, and above {LOWEST:.0f}); "
                        "make the file again with rlhf_dpo_generate_save.py")
    if not pairs:
        of_thumbs = " (single answers, thumbs up or down, train with --loss kto)" if n_thumbs and not thumbs else ""
        raise UserError(f"{path}: none of its {len(content)} pairs can be used: {left_out['too_long']} are longer than {max_len} "
                        f"tokens, {left_out['empty_answer']} have an empty answer{of_thumbs}; see --rlhf_max_corpus_len")
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
    return any(min(pair.chosen_base_prob, pair.reject_base_prob) < 0 for pair in pairs)


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
        if isinstance(entry, (list, tuple)) and len(entry) >= len(PARTS):
            more = entry[5] if len(entry) == len(PARTS) + 1 and isinstance(entry[5], dict) else {}
            for part, value in (*zip(PARTS, entry, strict=False), *((name, more.get(name)) for name in MORE)):
                if isinstance(value, Described) and value.dtype is None:
                    return f"the {part} of pair {number}"
    return "something in it"
