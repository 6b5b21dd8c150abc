"""Where an answer ends and which tokens it must not draw, as a finite automaton over tokens: one look-up per row and step.

A state knows how much of a stop the text ends with, as in the string search of Aho and Corasick (1975), so that stops are found
across token borders. It also knows whether the text before that is blank, with the bytes of an incomplete character,
since an answer never ends blank.
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Entries of the table of states: the token completes a stop, must not be drawn, or ends the answer itself.
STOPS, NEVER, ENDS = -1, -2, -3

_BLANKS = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]  # Unicode has none after these
# First bytes with a narrower range for the second byte (RFC 3629, section 4).
_NARROW = (b"\xe0", b"\xed", b"\xf0", b"\xf4")


class Automaton(NamedTuple):
    """Q states over V tokens; every answer begins in state 0."""

    next: Tensor  # int16 [Q, V], the state after a token, or STOPS, NEVER, ENDS
    n_blank: int  # in states below this one the text is blank


def build_automaton(pieces: Sequence[bytes], banned: Tensor, ends: Sequence[int], stops: Sequence[bytes]) -> Automaton:
    """The automaton for tokens with these bytes [V]; those in `banned` [V] (bool) are never drawn.

    Args:
        ends: tokens that end an answer.
        stops: texts that end it; none is empty.
    """
    moves = _by_bytes(stops)
    # A stable sort: the empty text is found first and stays first.
    states = sorted(moves, key=lambda state: not _is_blank(state))
    n_blank = sum(map(_is_blank, states))
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
    result[:n_blank, list(ends)], result[n_blank:, list(ends)] = NEVER, ENDS
    result[:, banned.numpy()] = NEVER
    return Automaton(torch.from_numpy(result), n_blank)


# A state is the text before the part that may become a stop (None: not blank; else the bytes of an incomplete character at the
# end of a blank text, made equal by `_like`), and that part: the longest end of the text that a stop begins with.
_State = tuple[bytes | None, bytes]


def _by_bytes(stops: Sequence[bytes]) -> dict[_State, list[_State | int]]:
    """All states that can be reached from an empty text, each with the states after the 256 bytes."""
    beginnings = {stop[:length] for stop in stops for length in range(len(stop))} | {b""}

    def after(text: bytes | None, begun: bytes, byte: int) -> _State | int:
        end = begun + bytes([byte])
        complete = max((stop for stop in stops if end.endswith(stop)), key=len, default=None)
        if complete is not None:
            # A stop begins with a whole character, so an incomplete one before it is cut off, and is no blank.
            return NEVER if _extended(text, end[:len(end) - len(complete)]) == b"" else STOPS
        begun = next(end[at:] for at in range(len(end) + 1) if end[at:] in beginnings)
        text = _extended(text, end[:len(end) - len(begun)])
        return (None if begun and text else text, begun)

    found: dict[_State, list[_State | int]] = {}
    todo: list[_State] = [(b"", b"")]
    while todo:
        state = todo.pop()
        if state not in found:
            found[state] = [after(*state, byte) for byte in range(256)]
            todo += [x for x in found[state] if not isinstance(x, int)]
    return found


def _is_blank(state: _State) -> bool:
    return _extended(*state) is not None


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
