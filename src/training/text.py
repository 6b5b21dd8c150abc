"""Next-token prediction on packed texts: the loss of `--sft 1`, and its held-out numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.model import RWKV
from src.preference.batching import batches_by_tokens
from src.preference.packing import Text, TextBatch, pack_texts
from src.preference.target_log_probs import target_log_probs

BATCH_TOKENS = 8192


def text_losses(model: RWKV, batch: TextBatch, grad_cp: bool = False) -> dict[str, Tensor]:
    """The loss of each of A tokens, -log p(token | all before it in its text) in nats: "loss", and "sft_loss", which is the same.

    Args:
        batch: on the model's device.

    Returns:
        [A] float32 each, whatever the model's precision. Their mean is over tokens, not over texts.
    """
    hidden, _ = model(batch.tokens, batch.cu_seqlens, grad_cp=grad_cp)
    losses = -target_log_probs(model.head, hidden[batch.positions], batch.targets)
    return {"loss": losses, "sft_loss": losses}


@torch.no_grad()
def evaluate_texts(model: RWKV, texts: Sequence[Text]) -> dict[str, float]:
    """loss and sft_loss, in nats a token: the mean over all `tokens` that have a loss. The training mode stays as it is."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches_by_tokens(texts, BATCH_TOKENS):
        losses = text_losses(model, pack_texts([texts[at] for at in batch]).to(model.device))["loss"]
        total, count = total + losses.double().sum(), count + len(losses)
    model.train(was_training)
    mean = float(total) / count
    return {"loss": mean, "sft_loss": mean, "tokens": count, "texts": len(texts)}
