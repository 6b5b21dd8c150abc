"""Log-probabilities of answers under a model: the one implementation for references, training and evaluation."""

from typing import NamedTuple

import torch
from torch import Tensor

from src.data.packing import PackedBatch
from src.model import RWKV
from src.preference.target_log_probs import target_log_probs


class AnswerLogProbs(NamedTuple):
    """Sums over each of the 2 B answers of a batch, in nats, and the number of tokens in each sum: 0 for an empty answer."""

    answer: Tensor  # [2 B] float32
    answer_tokens: Tensor  # [2 B] int64
    prompt: Tensor  # [2 B] float32, of each answer's prompt; zeros without `with_prompt`
    prompt_tokens: Tensor  # [2 B] int64


def answer_log_probs(model: RWKV, batch: PackedBatch, with_prompt: bool = False, grad_cp: bool = False) -> AnswerLogProbs:
    """Sum log pi(token | all before it) over each answer's tokens that have a loss, in float32 at every precision of the model.

    Args:
        batch: packed pairs, on the model's device.
        with_prompt: also sum over the prompts, for `--sft_on_prompt 1`.
        grad_cp: recompute the blocks in the backward instead of keeping their activations.
    """
    hidden, _ = model(batch.tokens, batch.cu_seqlens, parents=batch.parents, grad_cp=grad_cp)
    positions, targets, n_answers = batch.answer_positions, batch.answer_targets, len(batch.answer_prompts)
    if with_prompt:
        positions = torch.cat((positions, batch.prompt_positions))
        targets = torch.cat((targets, batch.prompt_targets))
    log_probs = target_log_probs(model.head, hidden[positions], targets)
    log_probs, prompt_log_probs = log_probs.tensor_split((len(batch.answer_of),))
    prompt_of = batch.prompt_of if with_prompt else batch.prompt_of[:0]
    prompt = log_probs.new_zeros(batch.n_prompts).index_add(0, prompt_of, prompt_log_probs)
    return AnswerLogProbs(
        log_probs.new_zeros(n_answers).index_add(0, batch.answer_of, log_probs),
        batch.answer_tokens,
        prompt[batch.answer_prompts],
        batch.prompt_tokens if with_prompt else torch.zeros_like(batch.prompt_tokens),
    )
