"""Writes answers to many prompts at once: prompts are read packed, rows are drawn together, and a finished row is replaced.

The batch stays full as long as prompts wait, even if answers differ in length. A row costs a constant-size state, kept in a slot
of the batch and updated in place. A common beginning of all prompts is read once, and so is a prompt that several rows share.
Each row draws from its own random stream, keyed by the seed, its row number, its number among the prompt's rejects and the number
of redraws. So its text does not depend on the other rows of the batch, on the batch's size or on a restart. With the CPU's
kernels (src/model/decode.py) that holds to the last bit, at every precision. Elsewhere matrix products of another shape differ in
their last bits, and a text diverges where two outcomes are that close: rarely in float32, often in bf16 and fp16.

On a GPU some steps are always queued: the result of a step is read while later ones run, so a finished row keeps its slot for
these few steps, drawing nothing.

An answer is never empty: a token that would end a row whose text is still blank is never drawn.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.console import say
from src.data.templates import CLASSIC, Ending
from src.errors import NotFinite, out_of_memory
from src.generation.automaton import Automaton, build_automaton
from src.generation.config import Sampling
from src.generation.graphs import Graphs
from src.generation.requests import Request, Waiting
from src.generation.sampler import BY_END_OF_TEXT, BY_MAX_TOKENS, BY_STOP, NOT_FINITE
from src.generation.slots import Slots
from src.generation.vocabulary import answer_text, end_tokens, read_vocabulary
from src.model import RWKV, State
from src.model.decode import Forward, Kernels
from src.tokenizer import Tokenizer

# Most prompt tokens in a forward pass, which bounds its memory; a longer prompt continues in the next pass.
PREFILL_TOKENS = 2048
# Draws of a reject before it is kept although it is refused.
ATTEMPTS = 20

MAX_TOKENS = "max_tokens"
REASONS = {BY_STOP: "stop", BY_END_OF_TEXT: "end_of_text", BY_MAX_TOKENS: MAX_TOKENS}


class Answer(NamedTuple):
    """A finished row: its request, all tokens drawn (including those of the stop), its clean text, why it ended; and whether it
    is kept although it was refused `ATTEMPTS` times."""

    row: int
    sample: int
    tokens: list[int]
    text: str
    reason: str  # "stop", "end_of_text" or "max_tokens"
    refused: bool = False


@dataclass
class _Row:
    request: Request | None  # None once it is answered
    tokens: list[int] = field(default_factory=list)


class _Queued(NamedTuple):
    """A step that the device may not have finished: the rows in slots 0 .. n - 1 at that time, and its draws [2, n or more]."""

    rows: list[_Row]
    drawn: Tensor
    done: torch.cuda.Event | None

    def read(self) -> tuple[list[int], np.ndarray]:
        """Tokens and endings; waits for them."""
        if self.done:
            self.done.synchronize()
        tokens, ended = self.drawn[:, :len(self.rows)].numpy()
        return tokens.tolist(), ended


def generate(model: RWKV | Forward | Kernels, tokenizer: Tokenizer, requests: Sequence[Request], sampling: Sampling, seed: int,
             batch_size: int, on_tokens: Callable[[int], None] = lambda drawn: None,
             refuse: Callable[[Answer], bool] = lambda answer: False, ending: Ending = CLASSIC.ending) -> Iterator[Answer]:
    """Answer every request; answers are yielded as they finish, not in the requests' order.

    Args:
        model: from `src.model.decode.decoder_for`; a plain model runs by its own forward.
        requests: each is asked for when its turn comes, and all of them once before that, or more often if memory runs out.
        seed: with row, sample and attempt, the key of the row's random stream.
        batch_size: most rows drawn together; halved, with a line on stderr, if memory runs out.
        on_tokens: called after every step with the number of tokens drawn in it.
        refuse: whether an answer must be drawn again.
        ending: what ends an answer, unless `sampling` says otherwise.

    Raises:
        NotFinite: the model's logits are not finite.
    """
    engine = Forward(model) if isinstance(model, RWKV) else model
    ending = sampling.resolved(ending)
    ends = end_tokens(tokenizer, ending)
    vocabulary = read_vocabulary(tokenizer, engine.dimensions.vocab_size, ends)
    automaton = build_automaton(vocabulary.pieces, vocabulary.banned, ends, [stop.encode() for stop in ending.stops])
    waiting = Waiting(requests)
    while waiting:
        batch = None
        try:
            size = min(batch_size, len(waiting))
            batch = _Batch(engine, tokenizer, automaton, vocabulary.weight, sampling, ending, seed, size, waiting)
            yield from batch.run(on_tokens, refuse)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
            batch_size //= 2
            waiting.give_back([row.request for row in (batch.rows if batch else []) if row.request])
            say(f"memory ran out; continuing with {batch_size} rows at a time")


class _Batch:
    """Rows in slots 0 .. n - 1, the `waiting` requests, and the work between two tokens."""

    def __init__(self, engine: Forward | Kernels, tokenizer: Tokenizer, automaton: Automaton, weight: Tensor, sampling: Sampling,
                 ending: Ending, seed: int, size: int, waiting: Waiting):
        self.rows: list[_Row] = []
        self._engine, self._tokenizer, self._sampling, self._ending = engine, tokenizer, sampling, ending
        self._seed, self._size, self._waiting = seed, size, waiting
        self._forks: OrderedDict[tuple[int, ...], list[Tensor]] = OrderedDict()
        with torch.inference_mode():
            self._slots = Slots(engine, automaton, weight, sampling, size)
            prefix = waiting.survey()  # read once, for all of them
            self._prefix = len(prefix)
            self._prefix_state = prefill(engine, [prefix])[1] if prefix else None
        self._step = Graphs(self._slots.step, size, engine.device) if engine.captures else self._slots.step

    @torch.inference_mode()
    def run(self, on_tokens: Callable[[int], None], refuse: Callable[[Answer], bool]) -> Iterator[Answer]:
        queue: deque[_Queued] = deque()
        while True:
            joining = self._waiting.take(self._size - len(self.rows))
            if joining:
                try:
                    self._join(joining)
                except BaseException:
                    self._waiting.give_back(joining)
                    raise
            if not self.rows:
                return
            queue.append(self._queue_step())
            if len(queue) > self._engine.ahead:
                yield from self._settle(queue.popleft(), on_tokens, refuse)

    def _queue_step(self) -> _Queued:
        drawn, done, device = self._step(len(self.rows)).to("cpu", non_blocking=True), None, self._engine.device
        if device.type == "cuda":
            done = torch.cuda.current_stream(device).record_event()
        return _Queued(self.rows.copy(), drawn, done)

    def _settle(self, queued: _Queued, on_tokens: Callable[[int], None], refuse: Callable[[Answer], bool]) -> Iterator[Answer]:
        """Append a step's tokens to its rows, and yield the answers that it finished."""
        tokens, ended = queued.read()
        drawing = [(row, token) for row, token in zip(queued.rows, tokens, strict=True) if row.request]
        for row, token in drawing:
            row.tokens.append(token)
        on_tokens(len(drawing))
        for slot in ended.nonzero()[0]:
            row = queued.rows[slot]
            if not row.request:
                continue  # it ended in an earlier step
            if ended[slot] == NOT_FINITE:
                raise NotFinite(f"the model's logits at row {row.request.row + 1}, token {len(row.tokens)} of its answer "
                                "are not finite; take bf16 or fp32 where --strategy says fp16, and check the checkpoint "
                                "where it does not")
            answer = Answer(row.request.row, row.request.sample, row.tokens,
                            answer_text(self._tokenizer, row.tokens, self._ending), REASONS[int(ended[slot])])
            refused = refuse(answer)
            again, row.request = row.request._replace(attempt=row.request.attempt + 1), None
            if refused and again.attempt < ATTEMPTS:
                self._waiting.give_back([again])
            else:
                yield answer._replace(refused=refused)
        if ended.any():
            self._leave()

    def _join(self, requests: list[Request]) -> None:
        """Give each request a slot after the last one, and read its prompt."""
        fresh: dict[tuple[int, ...], int] = {}  # prompts to read now, with their slots
        start = len(self.rows)
        lead: list[Request] = []
        rest: list[Request] = []
        for request in requests:
            known = request.prompt in fresh or request.prompt in self._forks
            (rest if known else lead).append(request)
            if not known:
                fresh[request.prompt] = start + len(fresh)
        if fresh:
            slots = slice(start, start + len(fresh))
            self._slots.hidden[slots], _ = prefill(self._engine, [prompt[self._prefix:] for prompt in fresh],
                                                   self._slots.state.rows(slots.start, slots.stop), self._prefix_state)
        for slot, request in enumerate(rest, start + len(lead)):
            taken = self._slots.take(fresh[request.prompt]) if request.prompt in fresh else self._forks[request.prompt]
            self._slots.put(slot, taken)
        for request in requests:
            if not self._waiting.need(request.prompt):
                self._forks.pop(request.prompt, None)
        for prompt, slot in fresh.items():
            if self._waiting.need(prompt):
                self._forks[prompt] = self._slots.take(slot)
        while len(self._forks) > max(1, self._size // 4):
            self._forks.popitem(last=False)
        requests = lead + rest
        streams = [np.random.Generator(np.random.Philox([self._seed, x.row, x.sample, x.attempt])) for x in requests]
        uniforms = np.stack([stream.random(self._sampling.max_tokens) for stream in streams])
        self._slots.sampler.enter(start, torch.from_numpy(uniforms))
        self.rows += [_Row(request) for request in requests]

    def _leave(self) -> None:
        """Free the slots of answered rows, filling each with the last row."""
        kept = list(range(len(self.rows)))  # the slot that each row was in before
        for slot in reversed([slot for slot, row in enumerate(self.rows) if not row.request]):
            self.rows[slot], kept[slot] = self.rows[-1], kept[-1]
            self.rows.pop()
            kept.pop()
        moves = [(slot, was) for slot, was in enumerate(kept) if slot != was]
        if moves:
            self._slots.move(*zip(*moves, strict=True))


@torch.inference_mode()
def prefill(engine: Forward | Kernels, prompts: Sequence[Sequence[int]], state: State | None = None, start: State | None = None,
            budget: int = PREFILL_TOKENS) -> tuple[Tensor, State]:
    """Read prompts of at least one token each, packed, `budget` tokens a forward pass.

    Args:
        state: gets the S states; None for new ones.
        start: the state that all prompts continue from; None for the state before any token.

    Returns:
        The hidden vectors after each prompt's last token [S, n_embd], and the S states there.
    """
    start = start or engine.fresh(1)
    state = state or engine.fresh(len(prompts))
    state.copy_(start)
    hidden: dict[int, Tensor] = {}
    for piece in _pieces([len(prompt) for prompt in prompts], budget):
        tokens = torch.tensor([token for i, first, end in piece for token in prompts[i][first:end]])
        tokens = tokens.to(engine.device, non_blocking=True)
        borders = torch.tensor([0] + [end - first for _, first, end in piece]).cumsum(0).to(torch.int32)
        first, last = piece[0][0], piece[-1][0]
        # A prompt that continues in the next piece gets its vector there.
        vectors = engine.advance(tokens, borders, state.rows(first, last + 1)).split(1)
        hidden.update(zip(range(first, last + 1), vectors, strict=True))
    return torch.cat(list(hidden.values())), state


def _pieces(lengths: list[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut the concatenated prompts every `budget` tokens: (prompt, start, end) for each part in a piece."""
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
