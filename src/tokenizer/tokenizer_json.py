"""Loads a Hugging Face `tokenizer.json`, adjusted so that every text is read completely and as text.

Truncation and padding, which a file keeps from its last use, are switched off, and so is BPE's dropout, which draws another split
at each call. Control words are always marked as special, whatever the file says, since the library then reads them as text.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

# The spelling of control words. Any other added token that a file does not call special is text with a token of its own:
# GPT-NeoX's runs of spaces, Gemma's HTML tags.
_CONTROL = re.compile(
    r"<[|｜].*[|｜]>|</?s>|<(?:pad|unk|bos|eos|sep|cls|mask|eot|eod|(?:start|begin|end)_of_\w+)>|\[(?:PAD|UNK|BOS|EOS|SEP|CLS|MASK)]",
    re.DOTALL | re.IGNORECASE)

MOST_IDS = 1 << 24  # the largest vocabularies have a million
MOST_GROWTH = 1000  # factor on a text's length by replacements


class TokenizerFile(NamedTuple):
    """The library's tokenizers as described in a file, and facts about its tokens."""

    whole: Tokenizer  # for a whole text, or its beginning
    continuing: Tokenizer | None  # for a text that continues another; None if `whole` reads it the same way
    control: frozenset[str]  # words that must not become the tokens of this name
    segments: re.Pattern[str] | None  # the other added tokens, after which the file's rules start again; None: none matters
    decoder: dict[str, Any] | None  # its description


def read_tokenizer_json(path: Path) -> TokenizerFile:
    """Raises the library's errors for a file that is no tokenizer, and ValueError for one that inflates texts."""
    tokenizer = Tokenizer.from_file(str(path))
    _check_ids(tokenizer.get_vocab(with_added_tokens=True))
    described = json.loads(tokenizer.to_str())
    for part in ("normalizer", "decoder"):
        # Each replacement by two letters may double a text.
        replacements = (inner["content"] for inner in parts_of(described[part]) if inner["type"] == "Replace")
        if math.prod(max(1, len(content)) for content in replacements) > MOST_GROWTH:
            raise ValueError(f"its {part} makes texts over {MOST_GROWTH} times as long")
    control = {word["content"] for word in described["added_tokens"] if word["special"] or _CONTROL.fullmatch(word["content"])}
    control |= set(_named_for_control(described)) & {word["content"] for word in described["added_tokens"]}
    for word in described["added_tokens"]:
        word["special"] = word["content"] in control
    described |= {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in described["model"]:
        described["model"]["dropout"] = None
    described["decoder"] = described["decoder"] or _missing_decoder(described)

    within = described | {name: _within_text(described[name]) for name in ("normalizer", "pre_tokenizer")}
    if within == described:
        return TokenizerFile(_build(described), None, frozenset(control), None, described["decoder"])
    if any(part["type"] == "Prepend" for part in parts_of(described["normalizer"])):
        # The library searches for these words with the prepended text, which only the beginning of a text has.
        within["added_tokens"] = [word | {"special": word["special"] or word["normalized"]} for word in within["added_tokens"]]
    return TokenizerFile(_build(described), _build(within), frozenset(control), _segments(within["added_tokens"]),
                         described["decoder"])


def _check_ids(vocabulary: dict[str, int]) -> None:
    """Raise ValueError for ids beyond `MOST_IDS`, which the library would iterate over, and for two words with the same id."""
    highest = max(vocabulary.values(), default=0)
    if highest >= MOST_IDS:
        raise ValueError(f"it has the token id {highest}, beyond {MOST_IDS}")
    words: dict[int, str] = {}
    for word, token in vocabulary.items():
        if words.setdefault(token, word) != word:
            raise ValueError(f"two words have the token id {token}")


def parts_of(described: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, with sequences flattened."""
    if described is not None and described["type"] != "Sequence":
        yield described
    elif described is not None:
        for part in next(parts for parts in described.values() if isinstance(parts, list)):
            yield from parts_of(part)


def _build(described: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _named_for_control(described: dict[str, Any]) -> Iterator[str]:
    """The tokens that the file itself uses for unknown letters, padding, and the ends of a text."""
    model, padding, ends = described["model"], described["padding"] or {}, described["post_processor"] or {}
    yield from filter(None, (model.get("unk_token"), padding.get("pad_token")))
    if model.get("type") == "Unigram" and model.get("unk_id") is not None:
        yield model["vocab"][model["unk_id"]][0]
    for part in (ends, *ends.get("processors", ())):
        yield from part.get("special_tokens", ())
        yield from (part[name][0] for name in ("sep", "cls") if name in part)


def _missing_decoder(described: dict[str, Any]) -> dict[str, Any] | None:
    """A decoder for a file without one. The library would put a space between all tokens, which is right only for whole words."""
    parts = [*parts_of(described["normalizer"]), *parts_of(described["pre_tokenizer"])]
    for part in parts:
        if part["type"] == "ByteLevel":
            return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        if part["type"] == "Metaspace":
            return part
    return {"type": "Fuse"} if described["model"].get("type") in ("BPE", "Unigram") else None


def _within_text(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer without its rules for a text's beginning."""
    if part is None or part["type"] == "Prepend":
        return None
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return part | {name: [inner for inner in map(_within_text, part[name]) if inner is not None]}
    changes: dict[str, dict[str, Any]] = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False},
                                          "Strip": {"strip_left": False}}
    if part["type"] == "Replace" and part["pattern"].get("Regex", "").startswith(("^", r"\A")):
        # In the library's regular expressions ^ is also the beginning of a line.
        regex = part["pattern"]["Regex"]
        return part | {"pattern": {"Regex": r"(?<=\n)" + regex[1:]}} if regex[0] == "^" else None
    return part | {name: value for name, value in changes.get(part["type"], {}).items() if name in part}


def _segments(added_tokens: list[dict[str, Any]]) -> re.Pattern[str] | None:
    """Finds the first added token that is text; the text after it also gets what is prepended to a text."""
    forms = []
    for word in sorted(added_tokens, key=lambda word: -len(word["content"])):
        form = rf"\b{re.escape(word['content'])}\b" if word["single_word"] else re.escape(word["content"])
        forms += [] if word["special"] else [rf"\s*{form}" if word["lstrip"] else form]
    return re.compile("|".join(forms)) if forms else None
