"""DPO with a share of SFT on one packed batch: the step that training and evaluation have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from src.model import RWKV
from src.preference.log_probs import answer_log_probs
from src.preference.loss import dpo_loss, sft_loss
from src.preference.packing import PackedBatch


@dataclass(frozen=True)
class Objective:
    """loss = -log sigmoid(margin) + alpha * NLL(chosen), the mean over pairs."""

    beta: float  # strength of the pull towards the reference
    alpha: float  # share of the SFT loss
    sft_on_prompt: bool = False  # the NLL's mean is over prompt and answer, not the answer alone


def pair_losses(model: RWKV, batch: PackedBatch, references: Sequence[tuple[float, float]], objective: Objective,
                grad_cp: bool = False) -> dict[str, Tensor]:
    """Everything that is known of each of B pairs.

    Args:
        batch: the pairs, packed, on the model's device.
        references: cached log ref(chosen | prompt) and log ref(reject | prompt) of each pair, in nats.

    Returns:
        [B] float32 each: loss, dpo_loss, sft_loss, reward_chosen, reward_rejected, margin, and log_prob_chosen,
        log_prob_reject (nats), answer_tokens (of both answers).
    """
    sums = answer_log_probs(model, batch, with_prompt=objective.sft_on_prompt, grad_cp=grad_cp)
    chosen, reject = sums.answer.view(-1, 2).unbind(1)
    reference = torch.tensor(references, dtype=chosen.dtype, device=chosen.device)
    dpo, reward_chosen, reward_rejected, margin = dpo_loss(chosen, reject, reference[:, 0], reference[:, 1], objective.beta)
    sft = sft_loss(chosen + sums.prompt.view(-1, 2)[:, 0], (sums.answer_tokens + sums.prompt_tokens).view(-1, 2)[:, 0])
    return {"loss": dpo + objective.alpha * sft, "dpo_loss": dpo, "sft_loss": sft, "reward_chosen": reward_chosen,
            "reward_rejected": reward_rejected, "margin": margin, "log_prob_chosen": chosen, "log_prob_reject": reject,
            "answer_tokens": sums.answer_tokens.view(-1, 2).sum(1)}
