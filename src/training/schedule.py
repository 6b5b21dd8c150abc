"""The learning rate over a run: linear warm-up, then a cosine from the initial to the final rate."""

import math


def learning_rate(step: int, total_steps: int, warmup_steps: int, lr_init: float, lr_final: float) -> float:
    """Rate of optimizer step `step` (0 is the first) of `total_steps`.

    The first `warmup_steps` steps rise linearly to the cosine's value. The first step's rate is above 0, so that no
    step is lost. The last step has `lr_final`.
    """
    progress = min(1.0, step / max(1, total_steps - 1))
    rate = lr_final + (lr_init - lr_final) * 0.5 * (1 + math.cos(math.pi * progress))
    return rate * min(1.0, (step + 1) / (warmup_steps + 1))
