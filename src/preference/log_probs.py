"""Log-probabilities of answers under a model: the one piece of code behind references, training and evaluation."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.model import RWKV
from src.preference.batching import PackedBatch

# Float32 logits held at a time, in elements (128 MB): their number is this over the vocabulary, whatever the batch.
LOGITS_AT_ONCE = 1 << 25


class SequenceLogProbs(NamedTuple):
    """Sums over each of S sequences, in nats, and how many tokens were summed."""

    answer: Tensor  # [S] float32
    answer_tokens: Tensor  # [S] int64
    prompt: Tensor  # [S] float32; of the chosen sequences alone, and zeros unless asked for
    prompt_tokens: Tensor  # [S] int64


def sequence_log_probs(model: RWKV, batch: PackedBatch, with_prompt: bool = False, grad_cp: bool = False) -> SequenceLogProbs:
    """Sum log pi(token | all before it) over each sequence's answer, in float32 whatever the model's precision.

    Args:
        batch: sequences packed end to end, on the model's device.
        with_prompt: also sum over the prompts of chosen sequences, for `--sft_on_prompt 1`.
        grad_cp: recompute the blocks in the backward instead of keeping their activations.
    """
    hidden, _ = model(batch.tokens, batch.cu_seqlens, grad_cp=grad_cp)
    answer = _summed(model, hidden, batch.targets, batch.answer_positions, batch.answer_segment, batch.n_sequences)
    nothing = batch.prompt_positions[:0]
    positions, segment = (batch.prompt_positions, batch.prompt_segment) if with_prompt else (nothing, nothing)
    return SequenceLogProbs(*answer, *_summed(model, hidden, batch.targets, positions, segment, batch.n_sequences))


def _summed(model: RWKV, hidden: Tensor, targets: Tensor, positions: Tensor, segment: Tensor,
            n_sequences: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(segment, minlength=n_sequences)
    piece = max(1, LOGITS_AT_ONCE // model.dimensions.vocab_size)
    # Logits are never kept for the backward: a piece at a time is computed again.
    pieces = positions.split(piece) if len(positions) else ()
    log_probs = [checkpoint(_target_log_probs, model, hidden[at], targets[at], use_reentrant=False) for at in pieces]
    log_probs = torch.cat(log_probs) if log_probs else torch.zeros(0, device=hidden.device)
    sums = log_probs.new_zeros(n_sequences).index_add(0, segment, log_probs)
    return sums, counts


def _target_log_probs(model: RWKV, hidden: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(model.logits(hidden), targets, reduction="none")
