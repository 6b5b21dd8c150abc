"""The preference losses as pure functions over vectors of summed log-probabilities: no model, no trainer.

Log-probabilities are in nats, one number an answer: the sum over its tokens. Half-precision inputs are
raised to float32; float64 stays float64.

Every loss takes what it needs of these, by name, and returns the same four vectors:

    policy_chosen, policy_reject        [B], log-probability of each answer under the model in training
    reference_chosen, reference_reject  [B], the same under the frozen base model; they need no gradient
    chosen_tokens, reject_tokens        [B], number of tokens in each sum
    beta, gamma, label_smoothing        numbers

    -> losses [B], reward_chosen [B], reward_rejected [B], margin [B]

KTO's pairs are thumbs: each has one answer, and the numbers of the other are 0.

The margin is the first reward minus the second, before a target is subtracted from it. A reward is beta times the
log-probability of the answer, relative to the reference if the loss has one, and a mean over its tokens if the loss divides by
length. `LOSSES` has them all, each with its settings: a new loss is a function and an entry there.
"""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from src import values
from src.settings import Flag

Losses = tuple[Tensor, Tensor, Tensor, Tensor]


def dpo_loss(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor, beta: float,
             label_smoothing: float = 0.0) -> Losses:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7): `-log sigmoid(margin)`.

    With label smoothing, the chance that a pair's labels are swapped, the conservative DPO of Mitchell 2023 ("A note on DPO with
    noisy preferences & relationship to IPO", cdpo): both cases' losses, each with its chance.

    Args:
        policy_chosen ... reference_reject: [B], see above.
        beta: strength of the pull towards the reference, above 0.
        label_smoothing: from 0 up to, not including, 0.5.

    Returns:
        [B] each: losses, reward_chosen and reward_rejected (the paper's implicit rewards, beta times how far the policy has moved
        from the reference), margin. Where the policy is the reference, margins are exactly 0.
    """
    rewards = _rewards(policy_chosen, policy_reject, reference_chosen, reference_reject, beta)
    return _smoothed(rewards[2], label_smoothing), *rewards


def robust_loss(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor, beta: float,
                label_smoothing: float) -> Losses:
    """Provably robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, rDPO): unbiased where labels are swapped at this rate.

    `((1 - e) * -log sigmoid(margin) - e * -log sigmoid(-margin)) / (1 - 2 e)`, e being label_smoothing, above 0 and below 0.5.
    Shapes and margin as in `dpo_loss`.
    """
    rewards = _rewards(policy_chosen, policy_reject, reference_chosen, reference_reject, beta)
    margin = rewards[2]
    losses = (label_smoothing * logsigmoid(-margin) - (1 - label_smoothing) * logsigmoid(margin)) / (1 - 2 * label_smoothing)
    return losses, *rewards


def hinge_loss(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor,
               beta: float) -> Losses:
    """The calibration loss of SLiC (Zhao et al. 2023, arXiv:2305.10425, section 2) on DPO's margin: `max(0, 1 - margin)`.

    In this form, relative to the reference and with beta, it is the hinge of RSO (Liu et al. 2023, arXiv:2309.06657, section 3).
    Shapes and margin as in `dpo_loss`.
    """
    rewards = _rewards(policy_chosen, policy_reject, reference_chosen, reference_reject, beta)
    return torch.relu(1 - rewards[2]), *rewards


def ipo_loss(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor,
             chosen_tokens: Tensor, reject_tokens: Tensor, beta: float) -> Losses:
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, equation 17): `(h - 1 / (2 beta))^2`.

    beta is the paper's tau. h is the difference of the two answers' log-ratios, each a mean over the answer's tokens, so that the
    target does not depend on length; TRL does the same on the authors' advice. The margin is `beta h`, and its target 0.5.
    """
    chosen, reject = (_full(policy) - _full(reference) for policy, reference in
                      ((policy_chosen, reference_chosen), (policy_reject, reference_reject)))
    chosen, reject = chosen / chosen_tokens, reject / reject_tokens
    return (chosen - reject - 1 / (2 * beta)) ** 2, beta * chosen, beta * reject, beta * (chosen - reject)


def simpo_loss(policy_chosen: Tensor, policy_reject: Tensor, chosen_tokens: Tensor, reject_tokens: Tensor, beta: float,
               gamma: float, label_smoothing: float = 0.0) -> Losses:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, equation 6): `-log sigmoid(margin - gamma)`, without a reference.

    Rewards are beta times an answer's mean log-probability of a token. gamma, 0 or above, is the margin to be reached; it is not
    subtracted from the margin returned. Label smoothing as in `dpo_loss`.
    """
    reward_chosen = beta * _full(policy_chosen) / chosen_tokens
    reward_rejected = beta * _full(policy_reject) / reject_tokens
    margin = reward_chosen - reward_rejected
    return _smoothed(margin - gamma, label_smoothing), reward_chosen, reward_rejected, margin


def cpo_loss(policy_chosen: Tensor, policy_reject: Tensor, beta: float, label_smoothing: float = 0.0) -> Losses:
    """Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417, equation 3): DPO with a uniform reference.

    `-log sigmoid(margin)`, rewards being beta times an answer's log-probability. The paper adds the chosen answer's
    log-likelihood (section 3), which is the SFT share of every objective here. Label smoothing as in `dpo_loss`.
    """
    reward_chosen, reward_rejected = beta * _full(policy_chosen), beta * _full(policy_reject)
    margin = beta * (_full(policy_chosen) - _full(policy_reject))
    return _smoothed(margin, label_smoothing), reward_chosen, reward_rejected, margin


def orpo_loss(policy_chosen: Tensor, policy_reject: Tensor, chosen_tokens: Tensor, reject_tokens: Tensor, beta: float) -> Losses:
    """The odds ratio part of ORPO (Hong, Lee and Thorne 2024, arXiv:2403.07691, equations 4 and 7), beta being its lambda.

    `-beta log sigmoid(log(odds(chosen) / odds(reject)))`, odds being P / (1 - P) and log P an answer's mean log-probability of a
    token (equation 3). ORPO is this plus the whole SFT loss (equation 6). Rewards are beta log P, as in TRL; the margin has the
    sign of the log odds ratio.
    """
    chosen, reject = _full(policy_chosen) / chosen_tokens, _full(policy_reject) / reject_tokens
    # log odds(chosen) - log odds(reject), the two large terms first.
    log_odds = (chosen - reject) - (_log1mexp(chosen) - _log1mexp(reject))
    return -beta * logsigmoid(log_odds), beta * chosen, beta * reject, beta * (chosen - reject)


def kto_loss(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor,
             chosen_tokens: Tensor, kl: Tensor, beta: float, desirable_weight: float = 1.0,
             undesirable_weight: float = 1.0) -> Losses:
    """Kahneman-Tversky optimization on thumbs (Ethayarajh et al. 2024, arXiv:2402.01306, equation 7), as in TRL.

    `desirable_weight (1 - sigmoid(beta (h - kl)))` for a thumb up, `undesirable_weight (1 - sigmoid(beta (kl - h)))` for one
    down, h being the answer's log-ratio of policy and reference.

    Args:
        policy_chosen ... reference_reject: [B], where the answer of the other kind is empty, any numbers.
        chosen_tokens: [B], 0 for a thumb down.
        kl: [], the estimated divergence of the policy from the reference, in nats, without a gradient (src/preference/kto.py).

    Returns:
        [B] each: losses; reward_chosen and reward_rejected, 0 in thumbs of the other kind; margin, by how much the reward is on
        the right side of beta * kl.
    """
    up = chosen_tokens > 0
    reward_chosen, reward_rejected, _ = _rewards(policy_chosen, policy_reject, reference_chosen, reference_reject, beta)
    margin = torch.where(up, reward_chosen - beta * kl, beta * kl - reward_rejected)
    weight = torch.full_like(margin, undesirable_weight).masked_fill(up, desirable_weight)
    # sigmoid(-x) is 1 - sigmoid(x) without its cancellation.
    return weight * torch.sigmoid(-margin), reward_chosen.where(up, 0.0), reward_rejected.where(~up, 0.0), margin


class Setting(NamedTuple):
    """A number that a loss takes: the name of its flag, without dashes, and the flag's description."""

    name: str
    flag: Flag


class Loss(NamedTuple):
    """A loss: its function, the settings of its parameters, and its share of the SFT loss; None: all of it."""

    function: Callable[..., Losses]
    settings: dict[str, Setting]  # by parameter
    sft_share: Setting | None


_DPO_BETA = Setting("dpo_beta", Flag(values.strength, 0.01, "strength of the pull towards the reference"))
_DPO_ALPHA = Setting("dpo_alpha", Flag(values.weight, 0.1, "share of the SFT loss on the chosen answers"))
_SMOOTHING = Setting("label_smoothing", Flag(values.number(1e-6, 0.4999, or_zero=True), 0.0,
                                             "chance that a pair's labels are swapped, below 0.5"))
LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo_loss, {"beta": _DPO_BETA, "label_smoothing": _SMOOTHING}, _DPO_ALPHA),
    "ipo": Loss(ipo_loss, {"beta": _DPO_BETA}, _DPO_ALPHA),
    "hinge": Loss(hinge_loss, {"beta": _DPO_BETA}, _DPO_ALPHA),
    "robust": Loss(robust_loss, {"beta": _DPO_BETA, "label_smoothing": _SMOOTHING}, _DPO_ALPHA),
    "simpo": Loss(
        simpo_loss,
        {"beta": Setting("simpo_beta", Flag(values.strength, 2.0, "scale of the answers' mean log-probabilities")),
         "gamma": Setting("simpo_gamma", Flag(values.weight, 1.0, "margin to be reached")), "label_smoothing": _SMOOTHING},
        Setting("simpo_alpha", Flag(values.weight, 0.0, "share of the SFT loss on the chosen answers"))),
    "orpo": Loss(
        orpo_loss,
        {"beta": Setting("orpo_alpha", Flag(
            values.strength, 0.1, "weight of the odds ratio relative to the SFT loss, the paper's lambda"))}, None),
    "cpo": Loss(
        cpo_loss,
        {"beta": Setting("cpo_beta", Flag(values.strength, 0.1, "scale of the answers' log-probabilities")),
         "label_smoothing": _SMOOTHING},
        Setting("cpo_alpha", Flag(values.weight, 1.0, "share of the SFT loss on the chosen answers"))),
    "kto": Loss(
        kto_loss,
        {"beta": Setting("kto_beta", Flag(values.strength, 0.1, "strength of the pull towards the reference")),
         "desirable_weight": Setting("kto_desirable_weight", Flag(values.strength, 1.0, "weight of the thumbs up")),
         "undesirable_weight": Setting("kto_undesirable_weight", Flag(values.strength, 1.0, "weight of the thumbs down"))},
        Setting("kto_alpha", Flag(values.weight, 0.0, "share of the SFT loss on the thumbs up"))),
}


def takers() -> dict[Setting, list[str]]:
    """The settings of all losses, each with the names of the losses that take it."""
    found: dict[Setting, list[str]] = {}
    for name, loss in LOSSES.items():
        for setting in (*loss.settings.values(), loss.sft_share):
            if setting is not None:
                found.setdefault(setting, []).append(name)
    return found


def loss_flags() -> dict[str, Flag]:
    """The flags of all losses; each one's help names the losses that take it."""
    return {name: replace(flag, help=f"{', '.join(losses)}: {flag.help}") for (name, flag), losses in takers().items()}


def takes(loss: str, name: str) -> bool:
    """Whether the loss of this name has a parameter `name`."""
    return name in signature(LOSSES[loss].function).parameters


def is_of_thumbs(loss: str) -> bool:
    """Whether the loss of this name is of single answers, not of pairs."""
    return takes(loss, "kl")


def needs_reference(loss: str) -> bool:
    return takes(loss, "reference_chosen")


def without_reference() -> list[str]:
    """The losses that need no reference."""
    return [loss for loss in LOSSES if not needs_reference(loss)]


def preference_loss(loss: str, **given: Tensor | float) -> Losses:
    """The loss of this name on those of `given` that it takes, named as in the module's docstring."""
    return LOSSES[loss].function(**{name: value for name, value in given.items() if takes(loss, name)})


def sft_loss(chosen_log_prob: Tensor, chosen_token_count: Tensor) -> Tensor:
    """Mean negative log-likelihood of a token, [B], from sums [B] and their numbers of tokens [B]; 0 for no tokens.

    With a loss on the prompt too, both the sums and the counts include the prompt's tokens.
    """
    return -_full(chosen_log_prob) / chosen_token_count.clamp(min=1)


def pref_percentage(previous: float, accuracy: float) -> float:
    """The running share of pairs with a margin above 0: an exponential average, starting from 0.5."""
    return 0.9 * previous + 0.1 * accuracy


def _rewards(policy_chosen: Tensor, policy_reject: Tensor, reference_chosen: Tensor, reference_reject: Tensor,
             beta: float) -> tuple[Tensor, Tensor, Tensor]:
    # Policy minus reference first: the two are close, so the difference of these large sums is exact.
    reward_chosen = beta * (_full(policy_chosen) - _full(reference_chosen))
    reward_rejected = beta * (_full(policy_reject) - _full(reference_reject))
    return reward_chosen, reward_rejected, reward_chosen - reward_rejected


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    if not label_smoothing:
        return -logsigmoid(margin)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - p). A memorized answer has log p = 0 in float32, where this and its gradient would be infinite."""
    return torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).eps)))


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
