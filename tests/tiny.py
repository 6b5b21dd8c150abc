"""Tiny trained models for tests: a byte model that has learned a few hundred bytes of questions and answers by heart.

The text is laid out as the toolkit's own `User: ... Assistant: ...` template, so that preference tests can use it too.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from src.checkpoint.dimensions import Dimensions
from src.model import RWKV, build_model
from src.training.schedule import learning_rate
from tests.random_checkpoint import make_dimensions, random_weights

VERSIONS = ("x060", "x070")
HEAD_SIZES = (8, 16, 32, 64)
KINDS = ("random", "trained")
RANKS = {"x060": {"mix": 8, "decay": 8}, "x070": {"w": 8, "a": 8, "v": 8, "g": 16}}

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "lemon": "yellow"}
FACTS = [(f"What colour is {thing}?", f"It is {colour}.") for thing, colour in COLOURS.items()]
FACTS += [(f"{a} plus {b}?", f"{a + b}.") for a, b in product(range(2, 6), range(2, 6))]


def tiny_text(prompt: str, answer: str) -> list[int]:
    """The bytes of one turn, end-of-text (0) in front."""
    return [0, *f"User: {prompt}\n\nAssistant: {answer}\n\n".encode()]


def tiny_dimensions(version: str, head_size: int, n_layer: int = 2) -> Dimensions:
    """At least two heads and a width of 32."""
    return make_dimensions(version, n_layer, max(32, 2 * head_size), head_size, 256, ranks=RANKS[version])


@torch.enable_grad()
def trained_tiny(version: str, head_size: int, steps: int = 50, batch: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Train all weights of a random tiny model by Adam on packed turns of `FACTS`; one to three seconds on one core.

    Returns:
        float32 weights in the official layout. The mean loss over the text falls from about 6 to 0.2 nats a byte,
        which `tests/model/test_logits.py` checks.
    """
    dimensions = tiny_dimensions(version, head_size)
    model = build_model(random_weights(dimensions, seed), dimensions).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    turns = [tiny_text(*fact) for fact in FACTS]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 10, 1e-2, 1e-3)
        chosen = torch.randint(len(turns), (batch,), generator=generator).tolist()
        loss = text_loss(model, [turns[index] for index in chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def text_loss(model: RWKV, sequences: list[list[int]]) -> Tensor:
    """Mean cross-entropy, in nats, of each token after the first given those before it in its sequence."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence[:-1]])
    targets = torch.tensor([token for sequence in sequences for token in sequence[1:]])
    bounds = torch.tensor([0, *(len(sequence) - 1 for sequence in sequences)]).cumsum(0).int()
    return F.cross_entropy(model.logits(model(tokens, bounds)[0]), targets)
