"""Gradient checkpointing of a block that keeps what is dear to compute and cheap to hold: products narrower than their inputs.

A product's cost for each number that it makes is the width of its input. The square ones (r, k, v, output) and those that
narrow (the FFN's value, the thin side of low-rank pairs) are kept; those that widen (the FFN's key), everything element by
element and the recurrence are made again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from src.quantization.linear import quantized_product


def recomputed(block: Callable, *arguments: Any) -> Any:
    """block(*arguments), of which the backward makes most again."""
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    if operator == torch.ops.aten.mm.default:
        wide, narrow = arguments[1].shape
    elif operator == quantized_product:
        narrow, wide = arguments[3], arguments[0].shape[-1]
    else:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE if narrow <= wide else CheckpointPolicy.PREFER_RECOMPUTE
