"""The losses of one packed batch, for training and evaluation: a preference loss with a share of SFT over pairs, next-token
prediction over texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from src.data.packing import PackedBatch, TextBatch
from src.model import RWKV
from src.preference.log_probs import answer_log_probs
from src.preference.loss import preference_loss, sft_loss
from src.preference.target_log_probs import target_log_probs


@dataclass(frozen=True)
class Objective:
    """preference loss + alpha * NLL(chosen), the mean over pairs; for DPO the first is -log sigmoid(margin).

    A thumb down has no NLL: its mean over thumbs is alpha * the mean over the thumbs up * their share.
    """

    numbers: Mapping[str, float | Tensor]  # the loss's own settings, by its function's parameters, such as beta
    alpha: float  # share of the SFT loss
    sft_on_prompt: bool = False  # the NLL's mean is over prompt and answer, not the answer alone
    loss: str = "dpo"  # one of src.preference.loss.LOSSES

    @property
    def loss_name(self) -> str:
        """The name of the preference loss among the numbers of a step."""
        return "dpo_loss" if self.loss == "dpo" else "preference_loss"

    def with_kl(self, kl: Tensor) -> "Objective":
        """KTO's, with the KL of its optimizer step, which is the same in all of the step's micro-batches."""
        return replace(self, numbers={**self.numbers, "kl": kl})


def pair_losses(model: RWKV, batch: PackedBatch, references: Tensor | Sequence[tuple[float, float]],
                objective: Objective, grad_cp: bool = False) -> dict[str, Tensor]:
    """The losses, rewards and log-probabilities of each of B pairs.

    Args:
        batch: the pairs, packed, on the model's device.
        references: cached log ref(chosen | prompt) and log ref(reject | prompt) of each pair, in nats; any numbers if the loss
            has no reference. A tensor [B, 2] on the model's device avoids waiting for a copy.

    Returns:
        [B] float32 each: loss, dpo_loss (preference_loss if the loss is not DPO), sft_loss, reward_chosen, reward_rejected,
        margin, and log_prob_chosen, log_prob_reject (nats), answer_tokens (of both answers). With KTO also kl, and desirable and
        undesirable, 1 where the thumb is of that kind; its numbers of the empty answer are 0.
    """
    # Before the forward, since a copy to a GPU waits for all work queued there.
    references = torch.as_tensor(references, dtype=torch.float64, device=model.device)
    sums = answer_log_probs(model, batch, with_prompt=objective.sft_on_prompt, grad_cp=grad_cp)
    chosen, reject = sums.answer.view(-1, 2).unbind(1)
    reference = references.to(chosen.dtype)
    chosen_tokens, reject_tokens = sums.answer_tokens.view(-1, 2).unbind(1)
    preference, reward_chosen, reward_rejected, margin = preference_loss(
        objective.loss, policy_chosen=chosen, policy_reject=reject, reference_chosen=reference[:, 0],
        reference_reject=reference[:, 1], chosen_tokens=chosen_tokens, reject_tokens=reject_tokens, **objective.numbers)
    up = chosen_tokens > 0
    sft = sft_loss(chosen + sums.prompt.view(-1, 2)[:, 0], (sums.answer_tokens + sums.prompt_tokens).view(-1, 2)[:, 0])
    sft = sft.where(up, 0.0)
    kto = {"kl": objective.numbers["kl"] + torch.zeros_like(margin), "desirable": up.to(margin),
           "undesirable": (~up).to(margin)} if "kl" in objective.numbers else {}
    return {"loss": preference + objective.alpha * sft, objective.loss_name: preference, "sft_loss": sft,
            "reward_chosen": reward_chosen, "reward_rejected": reward_rejected, "margin": margin,
            "log_prob_chosen": chosen, "log_prob_reject": reject, "answer_tokens": sums.answer_tokens.view(-1, 2).sum(1), **kto}


def text_losses(model: RWKV, batch: TextBatch, grad_cp: bool = False) -> dict[str, Tensor]:
    """The loss of each of A tokens, -log p(token | all before it in its text) in nats: "loss", and "sft_loss", which is the same.

    Args:
        batch: on the model's device.

    Returns:
        [A] float32 each, at every precision of the model. Their mean is over tokens, not over texts.
    """
    hidden, _ = model(batch.tokens, batch.cu_seqlens, grad_cp=grad_cp)
    losses = -target_log_probs(model.head, hidden[batch.positions], batch.targets)
    return {"loss": losses, "sft_loss": losses}
