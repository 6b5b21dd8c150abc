"""KTO's optimizer steps in float64 from the paper (arXiv:2402.01306, equation 7), and thumbs whose every number is its own."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.plain_model import Weights, log_probs
from tests.training.exact import Exact

BETA, UP, DOWN, ALPHA = 0.2, 1.3, 0.6, 0.4
FLAGS = {"loss": "kto", "kto_beta": BETA, "kto_desirable_weight": UP, "kto_undesirable_weight": DOWN, "kto_alpha": ALPHA}


def answer_log_prob(weights: Weights, prompt: list[int], answer: list[int], start: int = 0) -> Tensor:
    """Of the answer's tokens from `start` on, given all before them, in nats."""
    return log_probs(weights, prompt + answer)[len(prompt) + start - 1:].sum()


def save_thumbs(exact: Exact, path: Path, count: int) -> list[tuple]:
    """Write thumbs whose references are off the model's own log-probabilities, each by other nats; returns them.

    The mean of the mismatched answers' log-ratios is above 0 over any of them. One thumb up has a part without a loss.
    """
    thumbs = []
    for number in range(count):
        prompt, other = list(f"What is {number}?".encode()), list(f"Not {'that ' * (number % 3)}one.".encode())
        answer, start = list(f"It is {'x' * (2 * number % 7)}{number}.".encode()), 3 if number == 2 else 0
        is_up = number % 3 != 1
        with torch.no_grad():
            reference = answer_log_prob(exact.weights, prompt, answer, start).item() - 3.13 + 1.57 * number
            of_other = answer_log_prob(exact.weights, prompt, other).item() - 0.43 - 0.87 * (number % 4)
        more = {"kl": other, "kl_base_prob": of_other} | ({"chosen_from": start} if start else {})
        thumbs.append((prompt, answer, [], reference, 0.0, more) if is_up else (prompt, [], answer, 0.0, reference, more))
    torch.save(thumbs, path)
    return thumbs


class Thumb:
    """A thumb's numbers that do not depend on the others in its step, with their gradients."""

    def __init__(self, exact: Exact, thumb: tuple):
        prompt, chosen, reject, of_chosen, of_reject, more = thumb
        self.up, answer, start = bool(chosen), chosen or reject, more.get("chosen_from", 0)
        log_prob = answer_log_prob(exact.weights, prompt, answer, start)
        self.ratio, self.nll = log_prob.item() - (of_chosen if self.up else of_reject), -log_prob.item() / (len(answer) - start)
        self.slope = exact.gradient(log_prob)
        self.nll_slope = -self.slope / (len(answer) - start)
        with torch.no_grad():
            self.kl = answer_log_prob(exact.weights, prompt, more["kl"]).item() - more["kl_base_prob"]


def step_of(thumbs: Sequence[Thumb]) -> tuple[dict[str, float], Tensor]:
    """What metrics.jsonl tells of an optimizer step of these thumbs, and its gradient."""
    n, kl = len(thumbs), max(0.0, sum(thumb.kl for thumb in thumbs) / len(thumbs))
    preference, gradient, right = 0.0, torch.zeros_like(thumbs[0].slope), 0
    for thumb in thumbs:
        sign, weight = (1, UP) if thumb.up else (-1, DOWN)
        inside = 1 / (1 + math.exp(-sign * BETA * (thumb.ratio - kl)))
        preference += weight * (1 - inside) / n
        gradient -= weight * inside * (1 - inside) * sign * BETA * thumb.slope / n
        right += sign * (thumb.ratio - kl) > 0
    up, down = [thumb for thumb in thumbs if thumb.up], [thumb for thumb in thumbs if not thumb.up]
    numbers = {"preference_loss": preference, "kl": kl, "pref_accuracy": right / n,
               "loss": preference + ALPHA * sum(thumb.nll for thumb in up) / n}
    for thumb in up:
        gradient += ALPHA * thumb.nll_slope / n
    if up:
        numbers["sft_loss"] = sum(thumb.nll for thumb in up) / len(up)
        numbers["reward_chosen"] = BETA * sum(thumb.ratio for thumb in up) / len(up)
    if down:
        numbers["reward_rejected"] = BETA * sum(thumb.ratio for thumb in down) / len(down)
    if up and down:
        numbers["margin"] = numbers["reward_chosen"] - numbers["reward_rejected"]
    return numbers | {"grad_norm": gradient.norm().item()}, gradient
