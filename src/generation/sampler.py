"""Draws tokens from logits, all rows at once, and follows each row to its end; knows nothing about models.

A sampler has a slot for each row, with the row's own uniform numbers, the tokens drawn, the state of its automaton
(automaton.py) and how the row ended. The kernels of cuda/ draw in a few passes over a row's logits. Where they can't be built,
PyTorch draws by the pure functions here, which the kernels are tested against too. Neither waits for a GPU.

The maths is that of `PIPELINE` in the `rwkv` package, so that its settings have the same meaning here:
penalties are subtracted from the logits, the nucleus is cut at temperature 1, and the temperature reshapes
the rest. Two differences, where the package's result depends on rounding: top_p 1 keeps every token (the
package turns greedy where its float32 sum stays below 1), and ties at the top_k border are all kept.
"""

import torch
from torch import Tensor

from src import kernels
from src.generation.automaton import ENDS, NEVER, STOPS, Automaton
from src.generation.config import Sampling

# A nucleus seldom has more tokens; if it has, more are searched. Selecting this few takes a twentieth of a sort's time.
CANDIDATES = 256

# How a row has ended; the same numbers as in cpu/sample.h.
GOES_ON, BY_STOP, BY_END_OF_TEXT, BY_MAX_TOKENS, NOT_FINITE = range(5)


class KernelSampler:
    """By the kernels, on the CPU or a GPU."""

    def __init__(self, size: int, automaton: Automaton, weight: Tensor, sampling: Sampling, device: torch.device):
        """weight: float32 [V], added to a token's count when it is drawn."""
        self._rules = automaton.next.to(device), automaton.n_blank, weight.to(device)
        self._sampling, shape = sampling, (size, sampling.max_tokens)
        uniforms = torch.zeros(shape, dtype=torch.float64, device=device)
        tokens, counts = torch.zeros(shape, dtype=torch.int32, device=device), torch.zeros(shape, device=device)
        # For each row: distinct tokens, tokens drawn, the automaton's state, how it ended.
        rows = torch.tensor([0, 0, 0, BY_MAX_TOKENS], dtype=torch.int32).repeat(size, 1).to(device)
        self._tables = uniforms, tokens, counts, rows

    def enter(self, first: int, uniforms: Tensor) -> None:
        """Start rows in slots first .. first + n - 1: uniforms float64 [n, max_tokens] in [0, 1), one for each token."""
        slots = slice(first, first + len(uniforms))
        self._tables[0][slots].copy_(uniforms, non_blocking=True)
        self._tables[3][slots] = 0

    def draw(self, logits: Tensor) -> Tensor:
        """Draw for slots 0 .. n - 1: logits [n, V], overwritten -> int32 [2, n], the tokens and how each row has ended.

        A row that has ended draws nothing more; its token is 0.
        """
        how = self._sampling
        return torch.ops.rwkv_wkv.decode_sample(logits, *self._rules, *self._tables, how.presence, how.frequency,
                                                how.penalty_decay, how.temperature, how.top_p, how.top_k)

    def move(self, to: Tensor, source: Tensor) -> None:
        """Copy the rows from slots `source` [M] into slots `to` [M]."""
        for table in self._tables:
            table[to] = table[source]


class TorchSampler:
    """The same in PyTorch, with tables of the whole vocabulary."""

    def __init__(self, size: int, automaton: Automaton, weight: Tensor, sampling: Sampling, device: torch.device):
        self._next, self._n_blank, self._weight = automaton.next.to(device), automaton.n_blank, weight.to(device)
        self._sampling = sampling
        self._uniforms = torch.zeros(size, sampling.max_tokens, dtype=torch.float64, device=device)
        self._occurrence = torch.zeros(size, len(weight), device=device)
        self._seen = torch.zeros_like(self._occurrence, dtype=torch.bool)
        self._drawn, self._state = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        self._ended = torch.full_like(self._drawn, BY_MAX_TOKENS)
        # Searching all at once takes longer, but checking whether more are needed would wait for the device.
        self._candidates = CANDIDATES if device.type == "cpu" else len(weight)

    def enter(self, first: int, uniforms: Tensor) -> None:
        slots = slice(first, first + len(uniforms))
        self._uniforms[slots].copy_(uniforms, non_blocking=True)
        for table in (self._occurrence, self._seen, self._drawn, self._state, self._ended):
            table[slots] = 0

    def draw(self, logits: Tensor) -> Tensor:
        how, n = self._sampling, len(logits)
        place, state, ended = self._drawn[:n], self._state[:n], self._ended[:n]
        last, following = (place == how.max_tokens - 1).unsqueeze(-1), self._next[state]
        never = (following == NEVER) | (last & (following >= 0) & (following < self._n_blank))
        wrong = logits.isnan() | (logits == torch.inf)
        logits = penalize(logits, self._occurrence[:n], self._seen[:n], how.presence, how.frequency)
        logits = logits.masked_fill(never | wrong, -torch.inf)
        wrong = wrong.any(-1) | (logits == -torch.inf).all(-1)
        uniforms = self._uniforms[:n].gather(1, place.clamp(max=how.max_tokens - 1).unsqueeze(-1)).squeeze(-1)
        drawn = sample(logits, uniforms, how.temperature, how.top_p, how.top_k, self._candidates)
        drawn = drawn.masked_fill((ended != GOES_ON) | wrong, 0)
        after = following.gather(1, drawn.unsqueeze(-1)).squeeze(-1).to(torch.int64)
        count(self._occurrence[:n], self._seen[:n], drawn, self._weight, how.penalty_decay)
        place += 1
        why = torch.where(place == how.max_tokens, BY_MAX_TOKENS, GOES_ON)
        for how_so, ending in ((after == STOPS, BY_STOP), (after == ENDS, BY_END_OF_TEXT), (wrong, NOT_FINITE)):
            why = why.masked_fill(how_so, ending)
        ended.copy_(torch.where(ended == GOES_ON, why, ended))
        state.copy_(after.clamp(min=0))
        return torch.stack((drawn, ended)).to(torch.int32)

    def move(self, to: Tensor, source: Tensor) -> None:
        for table in (self._uniforms, self._occurrence, self._seen, self._drawn, self._state, self._ended):
            table[to] = table[source]


def choose_sampler(size: int, automaton: Automaton, weight: Tensor, sampling: Sampling,
                   device: torch.device) -> KernelSampler | TorchSampler:
    """The kernels' sampler where they can be built, else PyTorch's, with `size` slots."""
    by_kernel = device.type in ("cpu", "cuda") and kernels.missing(device.type) is None
    return (KernelSampler if by_kernel else TorchSampler)(size, automaton, weight, sampling, device)


def penalize(logits: Tensor, occurrence: Tensor, seen: Tensor, presence: float, frequency: float) -> Tensor:
    """Lower the logits of tokens drawn before.

    logits [B, V]; occurrence [B, V], the decayed count of each token; seen [B, V] bool, whether it was drawn at
    all (digits and spaces are seen but not counted) -> [B, V].
    """
    return logits - frequency * occurrence - presence * seen


def count(occurrence: Tensor, seen: Tensor, tokens: Tensor, weight: Tensor, decay: float) -> None:
    """Count the tokens just drawn, in place: occurrence and seen [B, V], tokens [B], weight [V] (1 for a token that counts)."""
    column = tokens.unsqueeze(-1)
    occurrence.mul_(decay).scatter_add_(-1, column, weight[column].to(occurrence.dtype))
    seen.scatter_(-1, column, True)


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int = 0,
           candidates: int = CANDIDATES) -> Tensor:
    """Draw one token a row: logits [B, V], uniforms [B] in [0, 1) -> tokens [B]. A row's token depends only on that row."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, temperature, top_p, top_k, candidates), uniforms)


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: int = 0, candidates: int = CANDIDATES) -> Tensor:
    """The distribution of `sample`: logits [B, V] -> [B, V], rows that sum to 1. The temperature is above 0.

    Tokens stay if they are at least as likely as the one at which the sorted sum reaches top_p, and at least as
    likely as the top_k-th; their probabilities are raised to 1 / temperature.
    """
    probs = logits.softmax(-1)
    cutoff = _nucleus(probs, top_p, min(candidates, probs.shape[-1])) if top_p < 1 else torch.zeros_like(probs[:, :1])
    if 0 < top_k < probs.shape[-1]:
        cutoff = cutoff.maximum(probs.topk(top_k, dim=-1).values[:, -1:])
    probs = probs.masked_fill(probs < cutoff, 0)
    if temperature != 1:
        # Relative to the largest, so that a low temperature can't make all of them zero.
        probs = (probs / probs.amax(-1, keepdim=True)) ** (1 / temperature)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution, tokens in the order of their ids: probs [B, V], uniforms [B] -> tokens [B]."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total even where the product rounds up to it; so a token of probability 0 is never drawn.
    target = (uniforms.unsqueeze(-1) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _nucleus(probs: Tensor, top_p: float, candidates: int) -> Tensor:
    """The probability [B, 1] of the token at which the sum from the likeliest down reaches top_p."""
    largest = probs.topk(candidates, dim=-1).values
    # Relative to their own sum, which float32's rounding keeps from being exactly 1, like the sums that it is compared with.
    share = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    reached = largest.cumsum(-1, dtype=torch.float64) >= share
    # If even the sum of all rounds to less than the share, all stay.
    cutoff = largest.gather(-1, reached.int().argmax(-1, keepdim=True)).masked_fill(~reached[:, -1:], 0)
    if candidates < probs.shape[-1] and len(short := (~reached[:, -1]).nonzero().squeeze(-1)):
        cutoff[short] = _nucleus(probs[short], top_p, min(16 * candidates, probs.shape[-1]))
    return cutoff
