"""Held-out numbers of a model on pairs or texts, by its training objective."""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.data.batching import batches_by_tokens
from src.data.packing import Text, pack_pairs, pack_texts
from src.evaluation.measures import TIE, won
from src.model import RWKV
from src.preference.loss import takes
from src.preference.objective import Objective, pair_losses, text_losses
from src.preference.pairs import Pair

BATCH_TOKENS = 8192


@torch.no_grad()
def evaluate_pairs(model: RWKV, pairs: Sequence[Pair], objective: Objective) -> dict[str, float]:
    """Means over the pairs; the model's training mode is left as it was.

    Returns:
        loss, dpo_loss (preference_loss if the loss is not DPO), sft_loss, reward_chosen, reward_rejected, margin: means.
        accuracy: share of pairs with margin > 0. A tie up to rounding counts one half, so that the untrained policy,
            which is the reference and ties on every pair, has 0.5.
        policy_accuracy: share of pairs whose chosen answer the policy itself finds likelier than the rejected one.
        pairs: how many there are.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    for batch in batches_by_tokens(pairs, BATCH_TOKENS):
        chosen_pairs = [pairs[at] for at in batch]
        losses = pair_losses(model, pack_pairs(chosen_pairs).to(model.device), [pair[3:] for pair in chosen_pairs], objective)
        # Rounding makes two means over tokens differ as much as one token, two sums as much as all tokens.
        tokens = 2 if takes(objective.loss, "chosen_tokens") else losses["answer_tokens"]
        losses["accuracy"] = won(losses["margin"] / objective.numbers.get("beta", 1.0), TIE * tokens)
        losses["policy_accuracy"] = (losses["log_prob_chosen"] > losses["log_prob_reject"]).float()
        for name, values in losses.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum()
    model.train(was_training)
    unreported = ("log_prob_chosen", "log_prob_reject", "answer_tokens")
    means = dict(zip(sums, torch.stack(list(sums.values())).div(len(pairs)).tolist(), strict=True))
    return {name: mean for name, mean in means.items() if name not in unreported} | {"pairs": len(pairs)}


@torch.no_grad()
def evaluate_texts(model: RWKV, texts: Sequence[Text]) -> dict[str, float]:
    """loss and sft_loss, in nats a token: the mean over all `tokens` that have a loss. The training mode stays as it is."""
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches_by_tokens(texts, BATCH_TOKENS):
        losses = text_losses(model, pack_texts([texts[at] for at in batch]).to(model.device))["loss"]
        total, count = total + losses.double().sum(), count + len(losses)
    model.train(was_training)
    mean = float(total) / count
    return {"loss": mean, "sft_loss": mean, "tokens": count, "texts": len(texts)}
