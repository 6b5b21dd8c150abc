"""Held-out numbers of a model on pairs or texts, by its training objective."""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.data.batching import batches_by_tokens
from src.data.packing import Text, pack_pairs, pack_texts
from src.evaluation.measures import TIE, won
from src.model import RWKV
from src.preference.kto import by_kind, kl_estimate, kl_part, pack_mismatched
from src.preference.loss import is_of_thumbs, takes
from src.preference.objective import Objective, pair_losses, text_losses
from src.preference.stored import Pairs

BATCH_TOKENS = 8192
UNREPORTED = ("log_prob_chosen", "log_prob_reject", "answer_tokens")


@torch.no_grad()
def evaluate_pairs(model: RWKV, pairs: Pairs, objective: Objective) -> dict[str, float]:
    """Means over the pairs; the model's training mode is left as it was.

    Returns:
        loss, dpo_loss (preference_loss if the loss is not DPO), sft_loss, reward_chosen, reward_rejected, margin: means.
        accuracy: share of pairs with margin > 0. A tie up to rounding counts one half, so that the untrained policy,
            which is the reference and ties on every pair, has 0.5.
        policy_accuracy: share of pairs whose chosen answer the policy itself finds likelier than the rejected one.
        pairs: how many there are.
        With KTO, see `_evaluate_thumbs`.
    """
    if is_of_thumbs(objective.loss):
        return _evaluate_thumbs(model, pairs, objective)
    was_training = model.training
    model.eval()
    means = _means(model, pairs, objective)
    model.train(was_training)
    return means | {"pairs": len(pairs)}


def _evaluate_thumbs(model: RWKV, thumbs: Pairs, objective: Objective) -> dict[str, float]:
    """Means over thumbs, under the KL of all of them.

    Returns:
        loss, preference_loss: means over all thumbs.
        sft_loss, reward_chosen: means over the thumbs up; reward_rejected: over those down; margin: the first reward minus the
            second. Left out where there are no such thumbs.
        kl: the estimate, in nats.
        accuracy: share of thumbs whose reward is on the right side of beta * kl; a tie up to rounding counts one half.
        pairs: number of thumbs.
    """
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches_by_tokens(thumbs.mismatched().sizes(), BATCH_TOKENS):
        packed, references = pack_mismatched([thumbs[at] for at in batch])
        parts.append(kl_part(model, packed.to(model.device), references.to(model.device), 1 / len(thumbs)))
    objective = objective.with_kl(kl_estimate(torch.stack(parts).sum()))
    means = _means(model, thumbs, objective)
    model.train(was_training)
    return by_kind(means) | {"pairs": len(thumbs)}


def _means(model: RWKV, pairs: Pairs, objective: Objective) -> dict[str, float]:
    """Means of all that `pair_losses` gives and that is reported, and of the accuracies."""
    of_thumbs = is_of_thumbs(objective.loss)
    sums: dict[str, Tensor] = {}
    for batch in batches_by_tokens(pairs, BATCH_TOKENS):
        some = [pairs[at] for at in batch]
        references = [(pair.chosen_base_prob, pair.reject_base_prob) for pair in some]
        losses = pair_losses(model, pack_pairs(some).to(model.device), references, objective)
        # Rounding makes two means over tokens differ as much as one token, two sums as much as all tokens.
        tokens = 2 if takes(objective.loss, "chosen_tokens") and not of_thumbs else losses["answer_tokens"]
        losses["accuracy"] = won(losses["margin"] / objective.numbers.get("beta", 1.0), TIE * tokens)
        if not of_thumbs:
            losses["policy_accuracy"] = (losses["log_prob_chosen"] > losses["log_prob_reject"]).float()
        for name, values in losses.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum()
    means = dict(zip(sums, torch.stack(list(sums.values())).div(len(pairs)).tolist(), strict=True))
    return {name: mean for name, mean in means.items() if name not in UNREPORTED}


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
