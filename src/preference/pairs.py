"""The `.save` file: token pairs with their cached reference log-probabilities, and its sidecar.

`NAME.save` is `torch.save` of a list of tuples: a pair's prompt, chosen and reject tokens, its two references, and where it has
more, a dict of that (src/preference/entries.py). `NAME.save.json` says how the references were made, how many pairs there are,
and the sha256 of the `.save` that it belongs to, so that the two can't be mixed up. Files written by RWKV-LM-RLHF have no sidecar
and are read all the same. Messages count pairs from 1.
"""

import hashlib
import io
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from src.checked_json import BadJson, parse_json
from src.console import short
from src.data.load_template import RECORDED
from src.errors import UserError
from src.files import atomic_write, existing_file, json_text
from src.preference.entries import LOWEST, REFERENCES, is_log_prob
from src.preference.reading import read_entries
from src.preference.stored import Pairs
from src.preference.writing import write_pairs

# A sidecar's fields, including those of older versions; other fields are accepted.
_SIDECAR = {
    "sha256": str, "count?": int, "base_model?": str, "base_fingerprint?": str, "version?": str, "tokenizer?": str,
    "template?": RECORDED, "loss_on?": str,
    "templates?": {str: int}, "seed?": int, "max_len?": int, "cut?": int, "dropped?": int, "changed_texts?": int,
    "skipped_rows?": {"count": int, "rows": {str: [int]}}, "references?": bool, "precision?": str, "quantization?": (str, None),
    "unquantized_blocks?": [int], "quantized_otherwise?": {str: str},
}


def save_pairs(path: str | Path, pairs: Pairs, sidecar: dict[str, Any]) -> None:
    """Write `path` and `path` + ".json", the sidecar with `count` and `sha256` added.

    The same pairs give the same bytes. Both files are written in full before either takes its name, so that a
    full disk leaves the old two untouched. A crash between the two renames leaves a sidecar whose sha256 does not
    match, which `load_pairs` refuses.

    Raises UserError if writing fails.
    """
    with atomic_write(_sidecar_path(path)) as sidecar_file, atomic_write(path, "w+b") as file:
        write_pairs(pairs, file)
        file.seek(0)
        digest = hashlib.file_digest(cast(io.BufferedRandom, file), "sha256").hexdigest()
        sidecar = sidecar | {"count": len(pairs), "sha256": digest}
        text = json_text(sidecar, _sidecar_path(path), indent=2, ensure_ascii=False)
        sidecar_file.write(text.encode() + b"\n")
        sidecar_file.flush()


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
               thumbs: bool = False) -> tuple[Pairs, dict[str, Any] | None, dict[str, int]]:
    """Read and check a `.save`; nothing in it is ever executed.

    Tokens may be lists, tuples or 1-D integer tensors, references numbers or tensors of one element. References must be possible
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
    with path.open("rb") as file:
        sidecar = _read_sidecar(path, file)
        pairs = read_entries(file, path, vocab_size)
    _check_references(pairs, path)
    prompt, chosen, reject = pairs.tokens.lengths()
    kl = pairs.mismatched().lengths()[1]
    is_thumb = (chosen > 0) != (reject > 0)
    is_empty = ((chosen == 0) | (reject == 0)) & ~(is_thumb & thumbs)
    is_long = ~is_empty & (prompt + np.maximum(np.maximum(chosen, reject), kl) > max_len)
    left_out = {"too_long": int(is_long.sum()), "empty_answer": int(is_empty.sum())}
    if not (kept := ~(is_empty | is_long)).any():
        of_thumbs = " (single answers, thumbs up or down, train with --loss kto)" if is_thumb.any() and not thumbs else ""
        raise UserError(f"{path}: none of its {len(pairs)} pairs can be used: {left_out['too_long']} are longer than {max_len} "
                        f"tokens, {left_out['empty_answer']} have an empty answer{of_thumbs}"
                        f"{'; see --rlhf_max_corpus_len' if left_out['too_long'] else ''}")
    return pairs.selected(kept), sidecar, left_out


def _check_references(pairs: Pairs, path: Path) -> None:
    """Raise UserError if some are no log-probabilities; all may be if none is below 0, as in a file without references."""
    references = pairs.references()
    impossible = ~is_log_prob(references)
    if (references < 0).any() and impossible.any():
        at, which = np.argwhere(impossible)[0]
        raise UserError(f"{path}: {REFERENCES[which]} of pair {at + 1} is {references[at, which]:g}, which no answer's "
                        f"log-probability can be (at most 0, and above {LOWEST:.0f}); make the file again with "
                        "rlhf_dpo_generate_save.py")


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


def has_references(pairs: Pairs, sidecar: dict[str, Any] | None) -> bool:
    """Whether the references were computed at all.

    `rlhf_dpo_generate_save.py --reference 0` computes none, stores 0.0 and says so in the sidecar. RWKV-LM-RLHF stores 0.5 for
    losses without a reference. Real references have some answer below 0.
    """
    if sidecar is not None and not sidecar.get("references", True):
        return False
    return bool((pairs.references()[:, :2] < 0).any())


def _worded(value: Any) -> str:
    return "none" if value is None else short(str(value))


def _sidecar_path(path: str | Path) -> Path:
    return Path(f"{path}.json")


def _read_sidecar(path: Path, file: IO[bytes]) -> dict[str, Any] | None:
    sidecar_path = _sidecar_path(path)
    if not sidecar_path.exists():
        return None
    again = "run rlhf_dpo_generate_save.py again, or remove the sidecar to do without it"
    try:
        sidecar = parse_json(existing_file(sidecar_path, "sidecar").read_bytes(), _SIDECAR)
    except BadJson as error:
        raise UserError(f"{sidecar_path}: {error}; {again}") from None
    if sidecar["sha256"] != hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest():
        raise UserError(f"{sidecar_path}: belongs to another {path.name} than the one next to it (the sha256 differs); {again}")
    # Older sidecars lack it: they are from before there were adapters that split weights.
    return {"quantized_otherwise": {}} | sidecar
