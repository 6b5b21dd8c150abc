"""Models small enough to generate with in a test: random ones, and one whose logits are chosen."""

import torch
from torch import Tensor

from src.model import RWKV, build_model
from tests.random_checkpoint import make_dimensions, random_weights

PROMPTS = [f"User: {text}\n\nAssistant:".encode() for text in
           ("Hi", "What is a list?", "Name three colours, and say which of them is the warmest.", "é", "x" * 40, "2 + 2", "Why?")]


def random_model(version: str, dtype: torch.dtype = torch.float32, vocab_size: int = 256) -> RWKV:
    dimensions = make_dimensions(version, n_layer=2, n_embd=32, head_size=8, vocab_size=vocab_size)
    return build_model(random_weights(dimensions, seed=5), dimensions, dtype)


def fixed_model(logits: Tensor) -> RWKV:
    """A model that gives these logits [V] after any text: its last norm lets nothing through but a constant."""
    model = random_model("x070", vocab_size=len(logits))
    model.ln_out.weight.zero_()
    model.ln_out.bias.zero_()[0] = 1
    model.head.weight[:, 0] = logits
    return model


def logits_of(vocab_size: int = 256, **by_text: float) -> Tensor:
    """Logits of -20 but for the named tokens: logits_of(a=2.0, newline=1.0)."""
    logits = torch.full((vocab_size,), -20.0)
    for text, value in by_text.items():
        logits[ord({"newline": "\n", "space": " ", "end": "\0"}.get(text, text))] = value
    return logits
