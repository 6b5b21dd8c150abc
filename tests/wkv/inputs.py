"""Inputs of the recurrences for tests, and both recurrences behind one call."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from src.wkv import wkv6, wkv7

VERSIONS = ("x060", "x070")
SHAPED_BY_TOKEN = {"x060": ("r", "log_w", "k", "v"), "x070": ("r", "log_w", "k", "v", "kappa", "a")}
# RWKV-7's decay is exp(-e^(-1/2) sigmoid(.)), so its logarithm is never below this.
LOWEST_LOG_W = -math.exp(-0.5)
# What a GPU makes where a NaN comes about, all bits of the mantissa set; a bfloat16 holds the upper half.
NAN_OF_A_GPU = 0x7fffffff


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw(version: str, lengths: list[int], n_head: int, head_size: int, seed: int = 0) -> dict[str, Tensor]:
    """Float64 inputs, by name, of sequences packed end to end, with values that float32 holds exactly.

    Decays from lasting ones to such that forget almost at once: log_w of v6 is log-normal around -1 with a spread
    of e^2, that of v7 fills its whole range.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (sum(lengths), n_head, head_size)
    inputs = {name: normal(*shape) for name in SHAPED_BY_TOKEN[version]}
    if version == "x060":
        inputs["log_w"] = -torch.exp(2 * inputs["log_w"])
        inputs["u"] = normal(n_head, head_size)
    else:
        inputs["log_w"] = LOWEST_LOG_W * torch.sigmoid(3 * inputs["log_w"])
        inputs["kappa"] = F.normalize(inputs["kappa"], dim=-1)
        inputs["a"] = torch.sigmoid(2 * inputs["a"])
    inputs["state"] = normal(len(lengths), n_head, head_size, head_size)
    return {name: x.double() for name, x in inputs.items()}


def run(version: str, inputs: dict[str, Tensor], cu_seqlens: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return (wkv6 if version == "x060" else wkv7)(**inputs, cu_seqlens=cu_seqlens, backend=backend)


def with_gradients(version: str, inputs: dict[str, Tensor], cu_seqlens: Tensor, backend: str,
                   dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y, the final state, and the gradients of a fixed random projection of both, in float64, by name."""
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    outputs = dict(zip(("y", "final state"), run(version, inputs, cu_seqlens, backend), strict=True))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs.values()]
    # Where no sequence has a token, y is empty and depends on nothing.
    projection = sum((x * weight).sum() for x, weight in zip(outputs.values(), weights, strict=True))
    gradients = torch.autograd.grad(projection, list(inputs.values()), materialize_grads=True)
    outputs |= {f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    return {name: x.detach().double() for name, x in outputs.items()}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm, by name; the difference itself where the truth is zero."""
    return {name: ((found[name] - x).norm() / (x.norm() if x.norm() > 0 else 1.0)).item() for name, x in truth.items()}


def poison(inputs: dict[str, Tensor], name: str, at: tuple[int, ...]) -> dict[str, Tensor]:
    """The inputs with one NaN."""
    x = inputs[name].clone()
    half = x.dtype == torch.bfloat16
    x.view(torch.int16 if half else torch.int32)[at] = NAN_OF_A_GPU >> 16 if half else NAN_OF_A_GPU
    return inputs | {name: x}
