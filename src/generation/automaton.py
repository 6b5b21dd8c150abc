"""Where an answer ends and which tokens it must not draw, as a finite automaton over tokens: one look-up per row and step.

A state knows how much of the stop the text ends with, as in the string search of Knuth, Morris and Pratt (1977), so that a stop
is found across token borders. It also knows whether the text before that is blank, with the bytes of an incomplete character,
since an answer never ends blank.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Entries of the table of states: the token completes the stop, must not be drawn, or is the end of text.
STOPS, NEVER, ENDS = -1, -2, -3

_BLANKS = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]  # Unicode has none after these
# First bytes with a narrower range for the second byte (RFC 3629, section 4).
_NARROW = (b"\xe0", b"\xed", b"\xf0", b"\xf4")


class Automaton(NamedTuple):
    """Q states over V tokens; every answer begins in state 0."""

    next: Tensor  # int16 [Q, V], the state after a token, or STOPS, NEVER, ENDS
    n_blank: int  # in states below this one the text is blank


def build_automaton(pieces: Sequence[bytes], banned: Tensor, end_of_text: int, stop: bytes) -> Automaton:
    """The automaton for tokens with these bytes [V]; those in `banned` [V] (bool) are never drawn."""
    moves = _by_bytes(stop)
    # A stable sort: the empty text is found first and stays first.
    states = sorted(moves, key=lambda state: not _is_blank(state, stop))
    n_blank = sum(_is_blank(state, stop) for state in states)
    numbers = {state: number for number, state in enumerate(states)} | {STOPS: STOPS, NEVER: NEVER}
    # STOPS and NEVER index the two last rows, which lead to themselves.
    table = np.array([[numbers[after] for after in moves[state]] for state in states] + [[NEVER] * 256, [STOPS] * 256], np.int16)

    order = np.argsort([-len(piece) for piece in pieces], kind="stable")
    lengths = np.array([len(pieces[token]) for token in order])
    starts, data = np.cumsum(lengths) - lengths, np.frombuffer(b"".join(pieces[token] for token in order), np.uint8)
    reached = np.repeat(np.arange(len(states), dtype=np.int16)[:, None], len(pieces), axis=1)
    for position in range(lengths[0]):
        longer = np.count_nonzero(lengths > position)
        reached[:, :longer] = table[reached[:, :longer], data[starts[:longer] + position]]
    result = np.empty_like(reached)
    result[:, order] = reached
    result[:n_blank, end_of_text], result[n_blank:, end_of_text] = NEVER, ENDS
    result[:, banned.numpy()] = NEVER
    return Automaton(torch.from_numpy(result), n_blank)


# A state is the text before the part that matches the stop (None: not blank; else the bytes of an incomplete character at the end
# of a blank text, made equal by `_like`), and how many bytes of the stop are matched.
_State = tuple[bytes | None, int]


def _by_bytes(stop: bytes) -> dict[_State, list[_State | int]]:
    """All states that can be reached from an empty text, each with the states after the 256 bytes."""
    borders = [0, 0]  # for each prefix of the stop, the longest shorter prefix that it ends with
    for matched in range(1, len(stop)):
        border = borders[matched]
        while border and stop[matched] != stop[border]:
            border = borders[border]
        borders.append(border + (stop[matched] == stop[border]))

    def after(text: bytes | None, matched: int, byte: int) -> _State | int:
        while True:
            if stop and byte == stop[matched]:
                # The stop begins with a whole character, so an incomplete one before it is cut off.
                before = None if matched == 0 and text else text
                return (before, matched + 1) if matched + 1 < len(stop) else STOPS if before is None else NEVER
            if matched == 0:
                return _extended(text, bytes([byte])), 0
            text, matched = _extended(text, stop[:matched - borders[matched]]), borders[matched]

    found: dict[_State, list[_State | int]] = {}
    todo: list[_State] = [(b"", 0)]
    while todo:
        state = todo.pop()
        if state not in found:
            found[state] = [after(*state, byte) for byte in range(256)]
            todo += [x for x in found[state] if not isinstance(x, int)]
    return found


def _is_blank(state: _State, stop: bytes) -> bool:
    text, matched = state
    return _extended(text, stop[:matched]) is not None


def _extended(text: bytes | None, more: bytes) -> bytes | None:
    if text is None:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return None if decoder.decode(text + more).strip() else _like(decoder.getstate()[0])


def _like(unfinished: bytes) -> bytes:
    """One representative for all incomplete characters that allow the same continuations."""
    if any(blank.startswith(unfinished) for blank in _BLANKS) or unfinished in _NARROW:
        return unfinished
    whole = 2 + (unfinished[0] >= 0xe0) + (unfinished[0] >= 0xf0)
    return {1: b"\xc3", 2: b"\xe4", 3: b"\xf1"}[whole - len(unfinished)]
