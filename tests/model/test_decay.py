"""A bfloat16 model's decays are float32: what rounding them would add up to over 4,096 tokens, and that a model keeps them."""

import math

import pytest
import torch
from torch import Tensor

from src.model import build_model
from src.model.decode import decoder_for
from tests.plain_model import recur_6, recur_7
from tests.random_checkpoint import random_weights
from tests.tiny import VERSIONS, tiny_dimensions

TOKENS, HEADS, SIZE = 4096, 2, 16
# What goes through the exponential of v6, and the sigmoid of v7: numbers of bfloat16, so that only what comes of them rounds.
# The slowest forgets a third of its state in so many tokens, the fastest all but a millionth.
D = {"x060": torch.linspace(-9.25, -5.75, 15), "x070": torch.linspace(-8.75, -5.25, 15)}
A, B = 65, 66  # the token that writes into the state, and that which does not


def channels(version: str) -> Tensor:
    """[HEADS x SIZE] of D's numbers, over and over."""
    return D[version].repeat(3)[:HEADS * SIZE]


def log_decay(version: str) -> Tensor:
    """float64 [H, N], by the papers."""
    d = channels(version).double().view(HEADS, SIZE)
    return -torch.exp(d) if version == "x060" else -math.exp(-0.5) * torch.sigmoid(d)


def retained(version: str, log_w: Tensor) -> Tensor:
    """[H, N]: what is left after TOKENS tokens of a state of ones, by the recurrence in float64."""
    nothing = torch.zeros(TOKENS, HEADS, SIZE, dtype=torch.float64)
    w, ones = log_w.exp().expand_as(nothing), torch.ones(HEADS, SIZE, SIZE, dtype=torch.float64)
    if version == "x060":
        return recur_6(nothing, w, nothing, nothing, nothing[0], ones)[1][:, :, 0]
    return recur_7(nothing, w, nothing, nothing, nothing, nothing, ones)[1][:, 0]


def error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).abs() / truth).max().item()


@pytest.mark.parametrize("version", VERSIONS)
def test_what_rounding_would_add_up_to(version):
    log_w = log_decay(version)
    truth = retained(version, log_w)
    torch.testing.assert_close(truth, torch.exp(TOKENS * log_w), rtol=1e-10, atol=0)
    assert truth.min() < 1e-4 and truth.max() > 0.6
    # A log decay is wrong by up to 2^-9 of itself, and so is the exponent of what is left: 13 nats here.
    assert error(retained(version, log_w.bfloat16().double()), truth) > 1e-2
    # Next below 1 bfloat16 has 0.996: a decay between the two forgets nothing, or all within a thousand tokens.
    assert error(retained(version, log_w.exp().bfloat16().double().log()), truth) > 0.3
    # In float32 it is 2^-24 of them.
    assert error(retained(version, log_w.float().double()), truth) < 1e-6


def model_of_decays(version: str) -> dict[str, Tensor]:
    """A checkpoint whose first block writes the token A into its state and nothing of B, and forgets by `channels` alone."""
    weights = random_weights(tiny_dimensions(version, SIZE))
    att = {name.removeprefix("blocks.0.att."): tensor for name, tensor in weights.items() if name.startswith("blocks.0.att.")}
    # Values are the difference of two inputs, which are one number in B.
    for part in ("weight", "bias"):
        for norm in ("ln0", "ln1"):
            weights[f"blocks.0.{norm}.{part}"][1] = weights[f"blocks.0.{norm}.{part}"][0]
    weights["emb.weight"][B, 1] = weights["emb.weight"][B, 0]
    att["value.weight"].zero_()[:, :2] = torch.tensor([1.0, -1.0])
    if version == "x060":
        for name in ("time_maa_w2", "time_decay_w2", "time_maa_k", "time_maa_v"):
            att[name].zero_()
        att["time_decay"].copy_(channels(version).view(1, 1, -1))
    else:
        for name in ("w2", "x_k", "x_v", "k_a", "a2"):
            att[name].zero_()
        att["w0"].copy_(channels(version).view(1, 1, -1))
        att["a0"].fill_(-200)  # nothing is removed but by the decay
    return weights


@pytest.mark.parametrize("by", ["the model", "what writes text"])
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_model_in_bfloat16_forgets_as_in_float64(version, by):
    model = build_model(model_of_decays(version), tiny_dimensions(version, SIZE), torch.bfloat16)

    def state_after(tokens: list[int]) -> Tensor:
        if by == "the model":
            return model(torch.tensor(tokens))[1].wkv[0][0].double()
        state = writer.fresh(1)
        writer.advance(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32), state)
        return state.wkv[0][0].double()

    writer = decoder_for(model) if by != "the model" else None
    left = state_after([A] + [B] * TOKENS) / state_after([A])
    if version == "x070":
        left = left.mT  # [head, value, key]
    truth = torch.exp(TOKENS * log_decay(version))[:, :, None].expand_as(left)
    # 4,096 factors in float32, each wrong by 2^-24, are 2e-4 off; rounded log decays 1e-2.
    assert error(left, truth) < 1e-3
