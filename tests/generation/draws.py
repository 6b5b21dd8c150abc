"""A kernel's draws beside PyTorch's, step after step."""

import torch

from src.generation.automaton import ENDS, NEVER, STOPS, Automaton
from src.generation.config import Sampling
from src.generation.sampler import BY_MAX_TOKENS, KernelSampler, TorchSampler

N_ROWS, MAX_TOKENS = 9, 17
SETTINGS = [{"top_p": 0.3}, {"top_p": 0.9, "temperature": 0.6}, {"top_p": 1.0}, {"top_p": 1.0, "top_k": 5},
            {"top_p": 0.95, "top_k": 40}, {"temperature": 0.0}, {"top_p": 1e-15}, {"top_p": 0.999999, "temperature": 2.0}]


def random_rules(vocab_size: int) -> tuple[Automaton, torch.Tensor]:
    """Two blank states and one that is not; some tokens are never drawn, and some end the row. And the tokens' weights."""
    generator = torch.Generator().manual_seed(8)
    following = torch.randint(0, 3, (3, vocab_size), generator=generator, dtype=torch.int16)
    chance = torch.rand(3, vocab_size, generator=generator)
    following[chance < 0.1] = NEVER
    following[2, chance[2] > 0.8], following[2, chance[2] > 0.9] = STOPS, ENDS
    return Automaton(following, 2), (torch.rand(vocab_size, generator=generator) < 0.8).float()


def check_draws(kernel: type[KernelSampler], settings: dict, scale: float, vocab_size: int, device: str = "cpu") -> None:
    """60 steps with penalties, in which rows join, end and move: the kernel's tokens and endings are those of PyTorch on the CPU,
    but for uniforms within rounding of a border; a row that went another way counts again when it is joined anew."""
    sampling = Sampling(presence=0.3, frequency=0.7, penalty_decay=0.9, max_tokens=MAX_TOKENS, **settings)
    generator = torch.Generator()
    ours = kernel(N_ROWS, *random_rules(vocab_size), sampling, torch.device(device))
    truth = TorchSampler(N_ROWS, *random_rules(vocab_size), sampling, torch.device("cpu"))
    nobody = torch.tensor([[0] * N_ROWS, [BY_MAX_TOKENS] * N_ROWS], dtype=torch.int32)
    assert ours.draw(torch.zeros(N_ROWS, vocab_size, device=device)).cpu().equal(nobody)
    alike, endings, apart = torch.ones(N_ROWS, dtype=torch.bool), set(), 0
    for step in range(60):
        if step % 20 == 0:  # all rows anew at first, then some
            first = 2 if step else 0
            uniforms = torch.rand(N_ROWS - first, MAX_TOKENS, generator=generator.manual_seed(step), dtype=torch.float64)
            ours.enter(first, uniforms)
            truth.enter(first, uniforms)
            alike[first:] = True
        if step % 20 == 7:
            to, source = torch.tensor([0, 3]), torch.tensor([8, 5])
            ours.move(to.to(device), source.to(device))
            truth.move(to, source)
            alike[to] = alike[source]
        logits = torch.randn(N_ROWS, vocab_size, generator=generator) * scale
        drawn, expected = ours.draw(logits.to(device, copy=True)).cpu(), truth.draw(logits)
        differing = alike & (drawn != expected).any(0)
        apart += int(differing.sum())
        alike &= ~differing
        endings |= set(expected[1, alike].tolist())
    # Where hundreds of terms are as good as equal, sums in another order move a border of the nucleus now and then.
    assert apart <= 4 and len(endings) > 1
