"""The preference loss as pure functions over vectors of summed log-probabilities: no model, no trainer.

Log-probabilities are in nats, one number an answer: the sum over its tokens. Half-precision inputs are
raised to float32; float64 stays float64.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    Args:
        policy_chosen, policy_reject: [B], log-probability of each answer under the model in training.
        reference_chosen, reference_reject: [B], the same under the frozen base model; no gradient is asked of them.
        beta: strength of the pull towards the reference, over 0.

    Returns:
        losses [B], `-log sigmoid(margin)`; reward_chosen [B] and reward_rejected [B], beta times how far the
        policy has moved from the reference on each answer (the paper's implicit reward); margin [B], the
        first reward minus the second. Where the policy is the reference, margins are exactly 0.
    """
    # Policy minus reference comes first: the two are close, so that the difference of these large sums is exact.
    reward_chosen = beta * (_full(policy_chosen) - _full(reference_chosen))
    reward_rejected = beta * (_full(policy_reject) - _full(reference_reject))
    margin = reward_chosen - reward_rejected
    return -logsigmoid(margin), reward_chosen, reward_rejected, margin


def sft_loss(chosen_log_prob: Tensor, chosen_token_count: Tensor) -> Tensor:
    """Mean negative log-likelihood of a token, [B], from sums [B] and the numbers of tokens summed over [B].

    With a loss on the prompt too, both the sums and the counts include the prompt's tokens.
    """
    return -_full(chosen_log_prob) / chosen_token_count


def pref_percentage(previous: float, accuracy: float) -> float:
    """The running share of pairs whose margin is over 0: an exponential average, starting from 0.5."""
    return 0.9 * previous + 0.1 * accuracy


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
