"""Write answers to many prompts at once: prompts are read packed, rows are drawn together, and a row that ends makes room.

The batch stays full as long as prompts wait, whatever the answers' lengths; a row costs a constant-size state, which lies in a
slot of the batch and changes in place. What all prompts begin with is read once, and so is a prompt that many rows have.
Each row draws from a random stream of its own, keyed by the seed, its number, which of its prompt's rejects it is and how often
that was drawn anew, so that its text does not depend on the rows beside it, on the batch's size or on a restart. By the CPU's
kernels (src/model/decode.py) that holds to the last bit, at every precision. Elsewhere matrix products of another shape differ in
their last bits, and where two outcomes lie that close the text goes another way: rarely in float32, often in bf16 and fp16.

An answer is never empty: a token that would end a row whose text is still blank is drawn again without it.
"""

import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError
from src.generation.config import Sampling
from src.generation.memory import out_of_memory
from src.generation.sampler import choose_sampler
from src.generation.vocabulary import Vocabulary, answer_text, read_vocabulary
from src.model import RWKV, State
from src.model.decode import Forward, Kernels
from src.tokenizer import Tokenizer

# Tokens of prompts a forward pass reads at most, which bounds its memory; longer prompts go on where they were cut.
PREFILL_TOKENS = 2048
# How often a reject is drawn before it may stand although it is refused.
ATTEMPTS = 20

STOP, END_OF_TEXT, MAX_TOKENS = "stop", "end_of_text", "max_tokens"


class Request(NamedTuple):
    """One answer to write: the row's number, its prompt's tokens (at least one), and which of the row's answers it is."""

    row: int
    prompt: tuple[int, ...]
    sample: int = 0
    attempt: int = 0


class Answer(NamedTuple):
    """A finished row: whose it is, all tokens drawn (those of the stop included), its clean text, why it ended; and whether it
    stands although it was refused `ATTEMPTS` times."""

    row: int
    sample: int
    tokens: list[int]
    text: str
    reason: str  # "stop", "end_of_text" or "max_tokens"
    refused: bool = False


@dataclass
class _Row:
    request: Request | None  # None once it is answered
    stream: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    tail: bytes = b""  # the end of the text so far, as long as a stop could begin in it


def generate(model: RWKV | Forward | Kernels, tokenizer: Tokenizer, requests: Iterable[Request], sampling: Sampling, seed: int,
             batch_size: int, on_tokens: Callable[[int], None] = lambda drawn: None,
             refuse: Callable[[Answer], bool] = lambda answer: False) -> Iterator[Answer]:
    """Answer every request; answers come as they finish, which is not the requests' order.

    Args:
        model: as `src.model.decode.serve` gives it; a plain model goes by its own forward.
        seed: with row, sample and attempt, the key of the row's random stream.
        batch_size: rows drawn together, at most; halved, and told, where memory runs out.
        on_tokens: called after every step with the number of tokens drawn in it.
        refuse: whether an answer must be drawn again.

    Raises:
        UserError: the model's logits are not finite.
    """
    engine = Forward(model) if isinstance(model, RWKV) else model
    vocabulary = read_vocabulary(tokenizer, engine.dimensions.vocab_size, sampling.ban_end_of_text, engine.device)
    waiting = deque(requests)
    while waiting:
        batch = None
        try:
            batch = _Batch(engine, tokenizer, vocabulary, sampling, seed, min(batch_size, len(waiting)), waiting)
            yield from batch.run(on_tokens, refuse)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
            batch_size //= 2
            waiting.extendleft(row.request for row in reversed(batch.rows if batch else []) if row.request)
            print(f"memory ran out; going on with {batch_size} rows at a time", file=sys.stderr, flush=True)


class _Batch:
    """Rows in slots 0 .. n - 1, the `waiting` ones, and all that is between two tokens."""

    def __init__(self, engine: Forward | Kernels, tokenizer: Tokenizer, vocabulary: Vocabulary, sampling: Sampling, seed: int,
                 size: int, waiting: deque[Request]):
        self.rows: list[_Row] = []
        self._engine, self._tokenizer, self._vocabulary, self._sampling = engine, tokenizer, vocabulary, sampling
        self._seed, self._size, self._waiting = seed, size, waiting
        self._left = Counter(request.prompt for request in waiting)
        self._forks: OrderedDict[tuple[int, ...], tuple[Tensor, State]] = OrderedDict()
        with torch.inference_mode():
            self._state = engine.fresh(size)
            self._sampler = choose_sampler(size, vocabulary, sampling, engine.device)
            self._prefix, self._prefix_state = self._read_prefix()

    def _read_prefix(self) -> tuple[int, State | None]:
        """What all waiting prompts begin with, but for one token at least: its length and the state after it."""
        # What the first and the last in order share, all share.
        first, last = min(self._left), max(self._left)
        differing = (i for i, (x, y) in enumerate(zip(first[:-1], last[:-1], strict=False)) if x != y)
        prefix = first[:next(differing, min(len(first), len(last)) - 1)] if first != last else ()
        return len(prefix), prefill(self._engine, [prefix])[1] if prefix else None

    @torch.inference_mode()
    def run(self, on_tokens: Callable[[int], None], refuse: Callable[[Answer], bool]) -> Iterator[Answer]:
        engine, hidden, state = self._engine, None, None
        while True:
            before = len(self.rows)
            joining = [self._waiting.popleft() for _ in range(min(self._size - before, len(self._waiting)))]
            if joining:
                try:
                    joined = self._join(joining)
                except BaseException:
                    self._waiting.extendleft(reversed(joining))
                    raise
                hidden = joined if hidden is None else torch.cat((hidden, joined))
            if not self.rows:
                return
            drawn, reasons = self._draw(engine.logits(hidden).float())
            on_tokens(len(drawn))
            for row, reason in zip(self.rows, reasons, strict=True):
                if reason:
                    answer = Answer(row.request.row, row.request.sample, row.tokens,
                                    answer_text(self._tokenizer, row.tokens, self._sampling.stop), reason)
                    refused = refuse(answer)
                    again, row.request = row.request._replace(attempt=row.request.attempt + 1), None
                    if refused and again.attempt < ATTEMPTS:
                        self._waiting.appendleft(again)
                        self._left[again.prompt] += 1
                    else:
                        yield answer._replace(refused=refused)
            self._sampler.enter(drawn)
            kept = self._leave(reasons)
            if kept != list(range(len(reasons))):
                drawn = drawn[torch.tensor(kept, dtype=torch.int64, device=drawn.device)]
            if state is None or len(self.rows) != len(state.wkv[0]):
                state = self._state.rows(0, len(self.rows))
                borders = torch.arange(len(self.rows) + 1, dtype=torch.int32)
            hidden = engine.advance(drawn, borders, state) if self.rows else None

    def _join(self, requests: list[Request]) -> Tensor:
        """Give each request a slot behind the last, its prompt read: hidden vectors [len(requests), n_embd]."""
        fresh: dict[tuple[int, ...], int] = {}  # prompts to be read now, with their places among the new slots
        lead, rest = [], []
        for request in requests:
            known = request.prompt in fresh or request.prompt in self._forks
            (rest if known else lead).append(request)
            if not known:
                fresh[request.prompt] = len(fresh)
        start, requests, hidden = len(self.rows), lead + rest, []
        if fresh:
            slots = self._state.rows(start, start + len(fresh))
            hidden.append(prefill(self._engine, [prompt[self._prefix:] for prompt in fresh], slots, self._prefix_state)[0])
        self._sampler.clear(start, start + len(requests))
        for i, request in enumerate(requests):
            slot = self._state.rows(start + i, start + i + 1)
            self._left[request.prompt] -= 1
            if i >= len(fresh):
                if request.prompt in fresh:
                    j = fresh[request.prompt]
                    one, source = hidden[0][j:j + 1], self._state.rows(start + j, start + j + 1)
                else:
                    one, source = self._forks[request.prompt]
                hidden.append(one)
                slot.copy_(source)
            if not self._left[request.prompt]:
                self._forks.pop(request.prompt, None)
        for prompt, j in fresh.items():
            if self._left[prompt]:  # more rows with it wait
                self._forks[prompt] = hidden[0][j:j + 1], self._state.rows(start + j, start + j + 1).clone()
        while len(self._forks) > max(1, self._size // 4):
            self._forks.popitem(last=False)
        self.rows += [_Row(x, np.random.Generator(np.random.Philox([self._seed, x.row, x.sample, x.attempt]))) for x in requests]
        return torch.cat(hidden)

    def _leave(self, reasons: Sequence[str | None]) -> list[int]:
        """Free the slots of rows that ended, filling each by the last row: where each slot's row was before."""
        kept = list(range(len(self.rows)))
        for slot in reversed([i for i, reason in enumerate(reasons) if reason]):
            last, moved = len(self.rows) - 1, self.rows.pop()
            was = kept.pop()
            if slot < last:
                self.rows[slot], kept[slot] = moved, was
                self._state.rows(slot, slot + 1).copy_(self._state.rows(last, last + 1))
                self._sampler.move(slot, last)
        return kept

    def _draw(self, logits: Tensor) -> tuple[Tensor, list[str | None]]:
        """Draw a token for each row, enter it there, and say which rows it ends: tokens [n], reasons."""
        tokens = self._sampler.draw(logits, self._uniforms(self.rows))
        drawn, reasons, sampling = tokens.tolist(), [], self._sampling
        stop, pieces, end_of_text = sampling.stop.encode(), self._vocabulary.pieces, self._tokenizer.end_of_text
        for i, row in enumerate(self.rows):
            while True:
                if drawn[i] < 0:
                    raise UserError(f"the model's logits at row {row.request.row + 1}, token {len(row.tokens) + 1} of its answer "
                                    "are not finite; take bf16 or fp32 where --strategy says fp16, and check the checkpoint "
                                    "where it does not")
                tail = row.tail + pieces[drawn[i]]
                row.tokens.append(drawn[i])
                reason = (END_OF_TEXT if drawn[i] == end_of_text else STOP if stop and stop in tail
                          else MAX_TOKENS if len(row.tokens) >= sampling.max_tokens else None)
                if not reason or answer_text(self._tokenizer, row.tokens, sampling.stop):
                    break
                logits[i, row.tokens.pop()] = -torch.inf
                tokens[i] = self._sampler.draw(logits[i:i + 1], self._uniforms([row]), i)[0]
                drawn[i] = int(tokens[i])
            row.tail = tail[max(0, len(tail) - len(stop) + 1):]
            reasons.append(reason)
        return tokens, reasons

    def _uniforms(self, rows: Sequence[_Row]) -> Tensor:
        return torch.tensor([row.stream.random() for row in rows], dtype=torch.float64, device=self._engine.device)


@torch.inference_mode()
def prefill(engine: Forward | Kernels, prompts: Sequence[Sequence[int]], state: State | None = None, start: State | None = None,
            budget: int = PREFILL_TOKENS) -> tuple[Tensor, State]:
    """Read prompts of at least one token each, packed, `budget` tokens a forward pass.

    Args:
        state: where the S states go; new ones where None.
        start: one state that all prompts go on from; that before any token where None.

    Returns:
        The hidden vectors after each prompt's last token [S, n_embd], and the S states there.
    """
    start = start or engine.fresh(1)
    state = state or engine.fresh(len(prompts))
    state.copy_(start)
    hidden: list[Tensor | None] = [None] * len(prompts)
    for piece in _pieces([len(prompt) for prompt in prompts], budget):
        tokens = torch.tensor([token for i, first, end in piece for token in prompts[i][first:end]], device=engine.device)
        borders = torch.tensor([0] + [end - first for _, first, end in piece]).cumsum(0).to(torch.int32)
        first, last = piece[0][0], piece[-1][0]
        # A prompt that goes on in the next piece gets its vector there.
        hidden[first:last + 1] = engine.advance(tokens, borders, state.rows(first, last + 1)).split(1)
    return torch.cat(hidden), state


def _pieces(lengths: list[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut prompts laid end to end every `budget` tokens: (prompt, start, end) for each part in a piece."""
    piece, room = [], budget
    for prompt, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + room)
            piece.append((prompt, start, end))
            room -= end - start
            start = end
            if not room:
                yield piece
                piece, room = [], budget
    if piece:
        yield piece
