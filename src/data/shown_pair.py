"""Shows one pair exactly as the model reads it: token by token, and which tokens carry the loss."""

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from src.console import console, printable, say
from src.data.templates import Piece
from src.data.token_lists import TokenPair
from src.data.tokenize import cut_beginning
from src.tokenizer import Tokenizer

BORDER = "│"
_STYLES = {"prompt": "dim", "chosen": "green", "reject": "red"}


def pair_as_read(pair: TokenPair, tokenizer: Tokenizer, max_len: int, keep_first: bool) -> dict[str, Any]:
    """The text of each token of "prompt", "chosen" and "reject", and under "no_loss" how many first tokens of the two answers
    have no loss.

    Args:
        max_len: tokens of prompt and longer answer together; the prompt loses its beginning, `keep_first` except the first token.
    """
    room = max_len - max(len(pair.chosen), len(pair.reject))
    parts = {"prompt": cut_beginning(pair.prompt, room, keep_first), "chosen": pair.chosen, "reject": pair.reject}
    words = _control_words(tokenizer)
    return {**{name: [words.get(token) or _text(token, tokenizer) for token in tokens] for name, tokens in parts.items()},
            "no_loss": {"chosen": pair.chosen_from, "reject": pair.reject_from}}


def text_as_read(pieces: Sequence[Piece], tokenizer: Tokenizer) -> str:
    """The text of pieces, with control tokens written as `pair_as_read` has them."""
    words = _control_words(tokenizer)
    return "".join(words[tokenizer.control[piece.text]] if piece.is_control else piece.text for piece in pieces)


def print_pair(shown: dict[str, Any]) -> None:
    """On stderr, in a terminal with colours: chosen green, reject red, what carries the loss underlined; a thumb's one answer."""
    for name, style in _STYLES.items():
        if name != "prompt" and not shown[name]:
            continue
        line = Text(f"{name:7}")
        for number, token in enumerate(shown[name]):
            has_loss = name != "prompt" and number >= shown["no_loss"][name]
            line.append(BORDER).append(_visible(token), f"{style} underline" if has_loss else style)
        console(stderr=True).print(line.append(BORDER), soft_wrap=True)
        if first := shown["no_loss"].get(name):
            say(f"        the first {first} of these {len(shown[name])} tokens, the thinking part, carry no loss")


def _control_words(tokenizer: Tokenizer) -> dict[int, str]:
    """The word of each control token; the first where there are several."""
    return {token: word for word, token in reversed(list(tokenizer.control.items()))}


def _text(token: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")


def _visible(text: str) -> str:
    """A token's text with line breaks and tabs as `\\n`, `\\r` and `\\t`."""
    return printable(text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"))
