"""The loss against the paper's formula stated again in float64 Python, and its gradients against differences."""

import math

import numpy as np
import pytest
import torch

from src.preference.loss import dpo_loss, pref_percentage, sft_loss


def plain_dpo(pc, pr, rc, rr, beta):
    """Equation 7 for one pair: -log sigmoid(beta log(pi/ref)(chosen) - beta log(pi/ref)(reject))."""
    margin = beta * (pc - rc) - beta * (pr - rr)
    if margin >= 0:
        return math.log1p(math.exp(-margin))
    return -margin + math.log1p(math.exp(margin))


def some_sums(n, seed=0):
    """Summed log-probabilities of answers of tens to hundreds of tokens, the policy some nats off its reference."""
    generator = np.random.default_rng(seed)
    reference = -generator.uniform(10, 800, (2, n))
    policy = reference + generator.normal(0, 20, (2, n))
    return torch.tensor(np.concatenate([policy, reference]))


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_float64_against_the_formula(beta):
    sums = some_sums(50)
    losses, chosen, rejected, margin = dpo_loss(*sums, beta)
    expected = [plain_dpo(*values, beta) for values in sums.T.tolist()]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(chosen, beta * (sums[0] - sums[2]))
    torch.testing.assert_close(rejected, beta * (sums[1] - sums[3]))
    torch.testing.assert_close(margin, chosen - rejected)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_float32_against_the_formula(beta):
    sums = some_sums(50).float()
    losses, *_ = dpo_loss(*sums, beta)
    expected = torch.tensor([plain_dpo(*values, beta) for values in sums.T.tolist()], dtype=torch.float64)
    assert losses.dtype == torch.float32
    # The margin of some tens of nats is right to a few units of the last place (6e-8 each). A loss that is small is
    # exp(-margin), whose relative error is the margin's absolute one: under 80 * 6e-8 * 4.
    torch.testing.assert_close(losses.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_gradients_against_central_differences(beta):
    sums = some_sums(20)
    policy = sums[:2].clone().requires_grad_()
    dpo_loss(policy[0], policy[1], sums[2], sums[3], beta)[0].sum().backward()
    step = 1e-4
    for which in range(2):
        for column, values in enumerate(sums.T.tolist()):
            above, below = list(values), list(values)
            above[which] += step
            below[which] -= step
            difference = (plain_dpo(*above, beta) - plain_dpo(*below, beta)) / (2 * step)
            # Central differences err by step^2 beta^3 and by rounding, 1e-16 * loss / step: both under 1e-9.
            assert policy.grad[which, column].item() == pytest.approx(difference, abs=1e-8)


def test_at_the_reference_margins_are_0_and_the_loss_is_log_2():
    reference = some_sums(30)[2:].float()
    losses, chosen, rejected, margin = dpo_loss(*reference, *reference, beta=0.1)
    assert not margin.any() and not chosen.any() and not rejected.any()
    torch.testing.assert_close(losses, torch.full((30,), math.log(2)))


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e4, -1e4]).requires_grad_()
    zero = torch.zeros(2)
    losses, *_ = dpo_loss(far, zero, zero, zero, 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4] and far.grad.tolist() == [0.0, -1.0]


def test_half_precision_is_raised_to_float32():
    # 300.5 and 300 differ in float32 but are one number in bfloat16.
    losses, chosen, *_ = dpo_loss(torch.tensor([-300.0]).bfloat16(), torch.tensor([-8.0]).bfloat16(),
                                  torch.tensor([-300.5]), torch.tensor([-8.0]), 1.0)
    assert losses.dtype == torch.float32 and chosen.item() == 0.5
    # 300 / 7 is 42.857142... in float32, and 42.75 in bfloat16.
    assert sft_loss(torch.tensor([-300.0]).bfloat16(), torch.tensor([7])).item() == pytest.approx(300 / 7, rel=1e-6)


def test_sft_loss_is_the_mean_over_tokens():
    log_probs = [[-1.0, -2.0, -6.0], [-0.5]]
    sums = torch.tensor([sum(values) for values in log_probs])
    losses = sft_loss(sums, torch.tensor([3, 1]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.tensor([3.0, 0.5]))


def test_pref_percentage_is_an_exponential_average():
    value = 0.5
    for accuracy in (1.0, 1.0, 0.0):
        value = pref_percentage(value, accuracy)
    assert value == pytest.approx(0.9 * (0.9 * (0.9 * 0.5 + 0.1) + 0.1))
