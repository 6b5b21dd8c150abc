"""A sampler's draws, each judged by the rule in float64: drawing the same token is not asked for where rounding decides.

A token is right if the rule gives it for some terms and sums within rounding of the exact ones. Every bound here is a sum of what
the operations behind a number may err by at most, in any order and by any set of instructions; U is half a unit in the last place
of a float32 between 1 and 2. All but a few draws are right for one token only, which `check_draws` asserts.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from src.generation.automaton import ENDS, NEVER, STOPS, Automaton
from src.generation.config import Sampling
from src.generation.sampler import BY_END_OF_TEXT, BY_MAX_TOKENS, BY_STOP, GOES_ON, KernelSampler, TorchSampler

N_ROWS, MAX_TOKENS, STEPS = 9, 17, 40
SETTINGS = [{"top_p": 0.3}, {"top_p": 0.9, "temperature": 0.6}, {"top_p": 1.0}, {"top_p": 1.0, "top_k": 5},
            {"top_p": 0.95, "top_k": 40}, {"temperature": 0.0}, {"top_p": 1e-15}, {"top_p": 0.999999, "temperature": 2.0}]
U, U_DOUBLE = 2.0**-24, 2.0**-53
# Float32 numbers below the first may become 0; the CUDA kernel sums whole multiples of the second.
SMALLEST, GRAIN = 2.0**-126, 2.0**-40


@dataclass
class Row:
    """What a row has drawn so far; `times` are the decayed counts."""

    uniforms: np.ndarray
    times: np.ndarray
    seen: np.ndarray
    state: int = 0
    drawn: int = 0
    ended: int = GOES_ON

    def copy(self) -> "Row":
        return replace(self, times=self.times.copy(), seen=self.seen.copy())


def random_rules(vocab_size: int) -> tuple[Automaton, torch.Tensor]:
    """Two blank states and one that is not; some tokens are never drawn, and some end the row. And the tokens' weights."""
    generator = torch.Generator().manual_seed(8)
    following = torch.randint(0, 3, (3, vocab_size), generator=generator, dtype=torch.int16)
    chance = torch.rand(3, vocab_size, generator=generator)
    following[chance < 0.1] = NEVER
    following[2, chance[2] > 0.8], following[2, chance[2] > 0.9] = STOPS, ENDS
    return Automaton(following, 2), (torch.rand(vocab_size, generator=generator) < 0.8).float()


def check_draws(kind: type[KernelSampler | TorchSampler], settings: dict, scale: float, vocab_size: int,
                device: str = "cpu") -> None:
    """Steps with penalties, in which rows join, end and move: each token and ending is one that the rule allows."""
    sampling = Sampling(presence=0.3, frequency=0.7, penalty_decay=0.9, max_tokens=MAX_TOKENS, **settings)
    generator, (automaton, weight) = torch.Generator(), random_rules(vocab_size)
    sampler = kind(N_ROWS, automaton, weight, sampling, torch.device(device))
    nobody = torch.tensor([[0] * N_ROWS, [BY_MAX_TOKENS] * N_ROWS], dtype=torch.int32)
    assert sampler.draw(torch.zeros(N_ROWS, vocab_size, device=device)).cpu().equal(nobody)
    rows, endings, n_draws, n_open = [], set(), 0, 0
    for step in range(STEPS):
        if step % 20 == 0:  # all rows anew at first, then some
            first = 2 if step else 0
            uniforms = torch.rand(N_ROWS - first, MAX_TOKENS, generator=generator.manual_seed(step), dtype=torch.float64)
            sampler.enter(first, uniforms)
            rows[first:] = [Row(x, np.zeros(vocab_size), np.zeros(vocab_size, bool)) for x in uniforms.numpy()]
        if step % 20 == 7:
            to, source = [0, 3], [8, 5]
            sampler.move(torch.tensor(to, device=device), torch.tensor(source, device=device))
            for target, row in zip(to, [rows[i].copy() for i in source], strict=True):
                rows[target] = row
        logits = torch.randn(N_ROWS, vocab_size, generator=generator) * scale
        tokens, ended = sampler.draw(logits.to(device, copy=True)).tolist()
        for number, row in enumerate(rows):
            if row.ended == GOES_ON:
                right = right_tokens(row, logits[number].double().numpy(), automaton, sampling)
                assert tokens[number] in right, (step, number)
                n_draws, n_open = n_draws + 1, n_open + (len(right) > 1)
                advance(row, tokens[number], automaton, weight, sampling)
            else:
                assert tokens[number] == 0, (step, number)
            assert ended[number] == row.ended, (step, number)
        endings |= set(ended)
    assert n_draws > 4 * N_ROWS and len(endings) > 1
    # At the worst, thousands of terms that are nearly equal, 0.5 % are to be expected: borders of tokens lie 2000 to a uniform's
    # range and 3e-7 wide, and a hundredth of the nucleuses end between two terms within rounding of each other.
    assert n_open <= 0.03 * n_draws, (n_open, n_draws)


def advance(row: Row, token: int, automaton: Automaton, weight: torch.Tensor, sampling: Sampling) -> None:
    """Enter a drawn token."""
    row.times *= sampling.penalty_decay
    row.times[token] += weight[token].item()
    row.seen[token] = True
    row.drawn += 1
    after = int(automaton.next[row.state, token])
    row.ended = {STOPS: BY_STOP, ENDS: BY_END_OF_TEXT}.get(after, BY_MAX_TOKENS if row.drawn == MAX_TOKENS else GOES_ON)
    row.state = max(after, 0)


def right_tokens(row: Row, logits: np.ndarray, automaton: Automaton, sampling: Sampling) -> np.ndarray:
    """The tokens that the rule gives for the row's next uniform, one unless rounding decides: logits [V], float64."""
    following = automaton.next[row.state].numpy()
    last = row.drawn == MAX_TOKENS - 1
    tokens = np.flatnonzero((following != NEVER) & ~(last & (following >= 0) & (following < automaton.n_blank)))
    logits, seen = logits[tokens], row.seen[tokens]
    penalties = sampling.frequency * row.times[tokens] + sampling.presence * seen
    # A count is a product with the rounded decay and a sum for each token drawn, all positive; then a product with the rounded
    # frequency, a sum with the rounded presence, and one or two differences. A token that was not drawn has nothing taken off.
    error = np.where(seen, U * ((3 * row.drawn + 4) * penalties + 2 * (np.abs(logits) + penalties)), 0.0)
    lowered = logits - penalties
    if sampling.temperature == 0:
        right = np.flatnonzero(lowered + error >= (lowered - error).max())
        return tokens[right[_firsts(logits[right], seen[right])]]
    largest = lowered.max()
    below = largest - lowered
    # Beside the logit's error: the difference to the largest, an exponential within 2 units in the last place (CUDA's and
    # cpu/simd.h's), and in PyTorch a division by the sum, of which only the rounding is each token's own.
    error += U * (below + 6)
    least, most = np.exp(-below - error) - SMALLEST, np.exp(-below + error) + SMALLEST
    surely, possibly = _kept(least, most, _equals(logits, seen), sampling)
    if sampling.temperature != 1:
        # The exponent is rounded, and a power is within 4 units in the last place (CUDA's); in PyTorch another division.
        error = U * (below / sampling.temperature + 10)
        least, most = (np.maximum(x, 0) ** (1 / sampling.temperature) * np.exp(e) for x, e in ((least, -error), (most, error)))
    least, most = np.where(surely, np.maximum(least - GRAIN, 0), 0), np.where(possibly, most, 0)
    return tokens[possibly & _hit(least, most, row.uniforms[row.drawn])]


def _equals(logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """How many tokens, itself included, have each token's logit and so its term exactly; of those drawn before only itself."""
    _, group, count = np.unique(logits[~seen], return_inverse=True, return_counts=True)
    equals = np.ones(len(logits), int)
    equals[~seen] = count[group]
    return equals


def _firsts(logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """All tokens drawn before, and of the others with exactly equal logits the first."""
    others = np.flatnonzero(~seen)
    return np.concatenate((np.flatnonzero(seen), others[np.unique(logits[others], return_index=True)[1]]))


def _kept(least: np.ndarray, most: np.ndarray, equals: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens surely, and which possibly, are among the top_p and top_k; terms lie between `least` and `most`.

    A token stays while all larger terms, A, have less than the share top_p of the sum, A + rest: (1 - top_p) A < top_p rest.
    """
    ranked, ranked_low = np.sort(-most), np.sort(-least)
    # Of each token: how many terms are possibly, and surely, larger than its own.
    n_most, n_least = np.searchsorted(ranked, -least), np.searchsorted(ranked_low, -most)
    n_most_others = n_most - equals
    surely, possibly = np.ones(len(least), bool), np.ones(len(least), bool)
    if sampling.top_k > 0:
        surely, possibly = n_most_others < sampling.top_k, n_least < sampling.top_k
    if sampling.top_p < 1:
        summed = np.maximum(least - GRAIN, 0)
        larger_most = _sums(-ranked)[n_most] - equals * most
        rest_least = summed.sum() - (_sums(summed[np.argsort(-most)])[n_most] - equals * summed)
        larger_least = _sums(np.sort(summed)[::-1])[n_least]
        rest_most = most.sum() - _sums(most[np.argsort(-least)])[n_least]
        slack = 2 * len(least) * U_DOUBLE * most.sum()  # the sums' own, in double precision
        # Below none there is nothing to sum.
        surely &= (n_most_others == 0) | ((1 - sampling.top_p) * larger_most < sampling.top_p * rest_least - slack)
        possibly &= (1 - sampling.top_p) * larger_least < sampling.top_p * rest_most + slack
    return surely, possibly


def _sums(x: np.ndarray) -> np.ndarray:
    """Of the first 0, 1, 2, ... numbers."""
    return np.concatenate(([0.0], x.cumsum()))


def _hit(least: np.ndarray, most: np.ndarray, uniform: float) -> np.ndarray:
    """At which tokens the running sum of weights may pass `uniform` of the whole: before <= uniform (before + from it on)."""
    before_least, upto_most = least.cumsum() - least, most.cumsum()
    from_most, after_least = upto_most[-1] - (upto_most - most), least.sum() - (before_least + least)
    slack = 2 * len(least) * U_DOUBLE * upto_most[-1]
    reached = (1 - uniform) * before_least <= uniform * from_most + slack
    return reached & (uniform * after_least <= (1 - uniform) * upto_most + slack)
