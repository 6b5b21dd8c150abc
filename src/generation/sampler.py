"""Sampling from logits, all rows at once; knows nothing of models.

On the CPU the kernel of cuda/bindings_decode.cpp draws, in one pass over a row's logits but for a few; elsewhere PyTorch, by the
pure functions here, which are also what the kernel is tested against.

The maths is that of `PIPELINE` in the `rwkv` package, so that its settings mean here what they mean there:
penalties are subtracted from the logits, the nucleus is cut at temperature 1, and the temperature reshapes
what is left. Two differences, where the package's result hangs on rounding: top_p 1 keeps every token (the
package turns greedy where its float32 sum stays below 1), and ties at the top_k border are all kept.
"""

import torch
from torch import Tensor

from src.generation.config import Sampling
from src.generation.vocabulary import Vocabulary
from src.wkv import native

# A nucleus seldom has more tokens; where it has, more are looked at. To select these few takes a twentieth of a sort's time.
CANDIDATES = 256


class KernelSampler:
    """Rows in slots; of each, the tokens drawn so far with their decayed counts."""

    def __init__(self, size: int, vocabulary: Vocabulary, sampling: Sampling):
        self._banned, self._weight, self._sampling = vocabulary.banned, vocabulary.weight, sampling
        self._tokens = torch.zeros(size, sampling.max_tokens, dtype=torch.int32)
        self._counts, self._lengths = torch.zeros(size, sampling.max_tokens), torch.zeros(size, dtype=torch.int32)

    def draw(self, logits: Tensor, uniforms: Tensor, first: int = 0) -> Tensor:
        """Draw for slots first .. first + n - 1: logits [n, V], uniforms [n] -> tokens [n]; -1 where a logit is not finite."""
        rows, how = slice(first, first + len(logits)), self._sampling
        return torch.ops.rwkv_wkv.decode_sample(logits, self._banned, self._tokens[rows], self._counts[rows], self._lengths[rows],
                                                uniforms, how.presence, how.frequency, how.temperature, how.top_p, how.top_k)

    def enter(self, drawn: Tensor) -> None:
        """Count the tokens just drawn [n], those of slots 0 .. n - 1."""
        torch.ops.rwkv_wkv.decode_count(drawn, self._tokens, self._counts, self._lengths, self._weight,
                                        self._sampling.penalty_decay)

    def move(self, to: int, source: int) -> None:
        for table in (self._tokens, self._counts, self._lengths):
            table[to] = table[source]

    def clear(self, first: int, last: int) -> None:
        """Forget what slots first .. last - 1 drew."""
        self._lengths[first:last] = 0


class TorchSampler:
    """The same on any device, by tables of the whole vocabulary."""

    def __init__(self, size: int, vocabulary: Vocabulary, sampling: Sampling):
        self._banned, self._weight, self._sampling = vocabulary.banned, vocabulary.weight, sampling
        self._occurrence = torch.zeros(size, len(self._banned), device=self._banned.device)
        self._seen = torch.zeros_like(self._occurrence, dtype=torch.bool)

    def draw(self, logits: Tensor, uniforms: Tensor, first: int = 0) -> Tensor:
        rows, how = slice(first, first + len(logits)), self._sampling
        wrong = logits.isnan() | (logits == torch.inf)
        logits = penalize(logits, self._occurrence[rows], self._seen[rows], how.presence, how.frequency)
        drawn = sample(logits.masked_fill(self._banned | wrong, -torch.inf), uniforms, how.temperature, how.top_p, how.top_k)
        return drawn.masked_fill(wrong.any(-1), -1)

    def enter(self, drawn: Tensor) -> None:
        n = len(drawn)
        count(self._occurrence[:n], self._seen[:n], drawn, self._weight, self._sampling.penalty_decay)

    def move(self, to: int, source: int) -> None:
        self._occurrence[to], self._seen[to] = self._occurrence[source], self._seen[source]

    def clear(self, first: int, last: int) -> None:
        self._occurrence[first:last], self._seen[first:last] = 0, False


def choose_sampler(size: int, vocabulary: Vocabulary, sampling: Sampling, device: torch.device) -> KernelSampler | TorchSampler:
    """For `size` slots."""
    by_kernel = device.type == "cpu" and native.missing("cpu") is None
    return (KernelSampler if by_kernel else TorchSampler)(size, vocabulary, sampling)


def penalize(logits: Tensor, occurrence: Tensor, seen: Tensor, presence: float, frequency: float) -> Tensor:
    """Lower the logits of tokens drawn before.

    logits [B, V]; occurrence [B, V], the decayed count of each token; seen [B, V] bool, whether it was drawn at
    all (digits and spaces are seen but not counted) -> [B, V].
    """
    return logits - frequency * occurrence - presence * seen


def count(occurrence: Tensor, seen: Tensor, tokens: Tensor, weight: Tensor, decay: float) -> None:
    """Enter the tokens just drawn, in place: occurrence and seen [B, V], tokens [B], weight [V] (1 for a token that counts)."""
    column = tokens.unsqueeze(-1)
    occurrence.mul_(decay).scatter_add_(-1, column, weight[column].to(occurrence.dtype))
    seen.scatter_(-1, column, True)


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """Draw one token a row: logits [B, V], uniforms [B] in [0, 1) -> tokens [B]. A row's token depends on that row alone."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, temperature, top_p, top_k), uniforms)


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """What `sample` draws from: logits [B, V] -> [B, V], rows that sum to 1. The temperature is above 0.

    Tokens stay if they are as likely as the one at which the sorted sum reaches top_p; among them those as
    likely as the top_k-th; their probabilities are raised to 1 / temperature.
    """
    probs = logits.softmax(-1)
    cutoff = _nucleus(probs, top_p, min(CANDIDATES, probs.shape[-1])) if top_p < 1 else torch.zeros_like(probs[:, :1])
    if 0 < top_k < probs.shape[-1]:
        cutoff = cutoff.maximum(probs.topk(top_k, dim=-1).values[:, -1:])
    probs = probs.masked_fill(probs < cutoff, 0)
    if temperature != 1:
        # Against the largest, so that a low temperature can't turn all of them to zero.
        probs = (probs / probs.amax(-1, keepdim=True)) ** (1 / temperature)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution, tokens in the order of their ids: probs [B, V], uniforms [B] -> tokens [B]."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Strictly below the total even where the product rounds up to it; strictly above is then never a token of probability 0.
    target = (uniforms.unsqueeze(-1) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _nucleus(probs: Tensor, top_p: float, candidates: int) -> Tensor:
    """The probability [B, 1] of the token at which the sum from the likeliest down reaches top_p."""
    largest = probs.topk(candidates, dim=-1).values
    reached = largest.cumsum(-1, dtype=torch.float64) >= top_p
    cutoff = largest.gather(-1, reached.int().argmax(-1, keepdim=True))
    short = (~reached[:, -1]).nonzero().squeeze(-1)
    if len(short):
        more = min(16 * candidates, probs.shape[-1])
        # Where even the sum of all rounds to less than top_p, all stay.
        cutoff[short] = _nucleus(probs[short], top_p, more) if more > candidates else 0
    return cutoff
