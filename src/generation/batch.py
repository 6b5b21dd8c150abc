"""Write answers to many prompts at once: prompts are read packed, rows are drawn together, and a row that ends makes room.

The batch stays full as long as prompts wait, whatever the answers' lengths; a row costs a constant-size state.
Each row draws from a random stream of its own, keyed by the seed and its number, so that its text does not
depend on which rows it shares a batch with, but for one thing that no sampler can promise: matrix products of
another shape differ in their last bits, and where two outcomes lie that close the text goes another way. In
float32 that is rare; in bfloat16 and float16 it is not, and there only a run with the same batch size, rows and
machine repeats itself.

An answer is never empty: a token that would end a row whose text is still blank is drawn again without it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError
from src.generation.config import Sampling
from src.generation.sampler import count, penalize, sample
from src.generation.vocabulary import Vocabulary, answer_text, read_vocabulary
from src.model import RWKV, State
from src.tokenizer import Tokenizer

# Tokens of prompts a forward pass reads at most, which bounds its memory; longer prompts carry their state over.
PREFILL_TOKENS = 4096

STOP, END_OF_TEXT, MAX_TOKENS = "stop", "end_of_text", "max_tokens"


class Answer(NamedTuple):
    """A finished row: its number, all tokens drawn (those of the stop included), its clean text, and why it ended."""

    row: int
    tokens: list[int]
    text: str
    reason: str  # "stop", "end_of_text" or "max_tokens"


@dataclass
class _Row:
    number: int
    stream: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    tail: bytes = b""  # the end of the text so far, as long as a stop could begin in it


@dataclass
class _Batch:
    """B rows between two tokens."""

    rows: list[_Row]
    hidden: Tensor  # [B, n_embd], what the next token is drawn from
    state: State
    occurrence: Tensor  # [B, V] float32
    seen: Tensor  # [B, V] bool

    def join(self, other: "_Batch") -> "_Batch":
        return _Batch(self.rows + other.rows, torch.cat((self.hidden, other.hidden)), State.cat((self.state, other.state)),
                      torch.cat((self.occurrence, other.occurrence)), torch.cat((self.seen, other.seen)))

    def select(self, kept: list[int]) -> "_Batch":
        index = torch.tensor(kept, dtype=torch.int64, device=self.hidden.device)
        return _Batch([self.rows[i] for i in kept], self.hidden[index], self.state.select(index), self.occurrence[index],
                      self.seen[index])


@torch.inference_mode()
def generate(model: RWKV, tokenizer: Tokenizer, prompts: Iterable[tuple[int, list[int]]], sampling: Sampling, seed: int,
             batch_size: int, on_tokens: Callable[[int], None] = lambda drawn: None) -> Iterator[Answer]:
    """Answer every prompt; answers come as they finish, which is not the prompts' order.

    Args:
        prompts: (row number, prompt tokens, at least one); read only as rows find room.
        seed: with the row number, the key of the row's random stream.
        batch_size: rows drawn together, at most.
        on_tokens: called after every step with the number of tokens drawn in it.

    Raises:
        UserError: the model's logits are not finite.
    """
    vocabulary = read_vocabulary(tokenizer, model.dimensions.vocab_size, sampling.ban_end_of_text, model.device)
    waiting = iter(prompts)
    batch = _start(model, [])
    while True:
        joining = list(islice(waiting, batch_size - len(batch.rows)))
        if joining:
            rows = [_Row(number, np.random.Generator(np.random.Philox([seed, number]))) for number, _ in joining]
            batch = batch.join(_start(model, rows, *prefill(model, [tokens for _, tokens in joining])))
        if not batch.rows:
            return
        logits = model.logits(batch.hidden)
        _require_finite(logits, batch.rows)
        logits = penalize(logits, batch.occurrence, batch.seen, sampling.presence, sampling.frequency)
        drawn, reasons = _draw(logits.masked_fill(vocabulary.banned, -torch.inf), batch.rows, tokenizer, vocabulary, sampling)
        on_tokens(len(drawn))
        for row, reason in zip(batch.rows, reasons, strict=True):
            if reason:
                yield Answer(row.number, row.tokens, answer_text(tokenizer, row.tokens, sampling.stop), reason)
        count(batch.occurrence, batch.seen, drawn, vocabulary.weight, sampling.penalty_decay)
        if any(reasons):
            kept = [i for i, reason in enumerate(reasons) if not reason]
            batch, drawn = batch.select(kept), drawn[kept]
        if batch.rows:
            borders = torch.arange(len(batch.rows) + 1, dtype=torch.int32)
            batch.hidden, batch.state = model(drawn, borders, batch.state)


@torch.inference_mode()
def prefill(model: RWKV, prompts: Sequence[Sequence[int]], budget: int = PREFILL_TOKENS) -> tuple[Tensor, State]:
    """Read prompts of at least one token each, packed, `budget` tokens a forward pass.

    Returns the hidden vectors after each prompt's last token [S, n_embd], and the S states there.
    """
    hidden, states, carried = [], [], None
    for piece in _pieces([len(prompt) for prompt in prompts], budget):
        tokens = torch.tensor([token for i, start, end in piece for token in prompts[i][start:end]], device=model.device)
        borders = torch.tensor([0] + [end - start for _, start, end in piece]).cumsum(0).to(torch.int32)
        fresh = [carried] if piece[0][1] else []
        fresh.append(model.initial_state(len(piece) - len(fresh)))
        out, after = model(tokens, borders, State.cat(fresh))
        last, _, end = piece[-1]
        complete = torch.arange(len(piece) - (end < len(prompts[last])), device=model.device)
        hidden.append(out[borders[1:].to(model.device)[complete] - 1])
        states.append(after.select(complete))
        carried = after.select(torch.tensor([len(piece) - 1], device=model.device))
    return torch.cat(hidden), State.cat(states)


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


def _start(model: RWKV, rows: list[_Row], hidden: Tensor | None = None, state: State | None = None) -> _Batch:
    """Rows that have drawn nothing yet; without hidden and state, no rows."""
    dimensions, device = model.dimensions, model.device
    if state is None:
        hidden = torch.zeros(0, dimensions.n_embd, dtype=model.dtype, device=device)
        state = State.zeros(dimensions, 0, model.dtype, device)
    shape = (len(rows), dimensions.vocab_size)
    return _Batch(rows, hidden, state, torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device))


def _draw(logits: Tensor, rows: list[_Row], tokenizer: Tokenizer, vocabulary: Vocabulary,
          sampling: Sampling) -> tuple[Tensor, list[str | None]]:
    """Draw a token for each row, enter it there, and say which rows it ends: tokens [B], reasons."""

    def pick(row_logits: Tensor, row_rows: list[_Row]) -> list[int]:
        uniforms = torch.tensor([row.stream.random() for row in row_rows], dtype=torch.float64, device=logits.device)
        return sample(row_logits, uniforms, sampling.temperature, sampling.top_p, sampling.top_k).tolist()

    drawn, reasons = pick(logits, rows), []
    stop = sampling.stop.encode()
    for i, row in enumerate(rows):
        while True:
            tail = row.tail + vocabulary.pieces[drawn[i]]
            row.tokens.append(drawn[i])
            reason = (END_OF_TEXT if drawn[i] == tokenizer.end_of_text else STOP if stop and stop in tail
                      else MAX_TOKENS if len(row.tokens) >= sampling.max_tokens else None)
            if not reason or answer_text(tokenizer, row.tokens, sampling.stop):
                break
            logits[i, row.tokens.pop()] = -torch.inf
            drawn[i], = pick(logits[i:i + 1], [row])
        row.tail = tail[max(0, len(tail) - len(stop) + 1):]
        reasons.append(reason)
    return torch.tensor(drawn, device=logits.device), reasons


def _require_finite(logits: Tensor, rows: list[_Row]) -> None:
    finite = logits.isfinite().all(-1)
    if not finite.all():
        row = rows[int((~finite).nonzero()[0])]
        raise UserError(f"the model's logits at row {row.number + 1}, token {len(row.tokens) + 1} of its answer are not finite; "
                        "take bf16 or fp32 where --strategy says fp16, and check the checkpoint where it does not")
