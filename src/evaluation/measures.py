"""What a model prefers among pairs, and how far the length of the answers explains it: functions of vectors, without a model."""

from typing import Any

import numpy as np

# Differences below this, in nats a token, are rounding: references have the same accuracy.
TIE = 1e-4
Vector = Any  # numpy's or torch's


def preference_measures(log_probs: np.ndarray, references: np.ndarray | None, tokens: np.ndarray, beta: float) -> dict:
    """Accuracies, margins and length bias over n pairs; a measure that does not exist is None.

    Args:
        log_probs: [n, 2], the summed log-probabilities of the chosen and the rejected answer under the model, in nats.
        references: [n, 2], the same under the reference model; None for none, and then there are no margins.
        tokens: [n, 2], lengths of the two answers.
        beta: of the margin, `beta ((log pi(c) - log pi(r)) - (log ref(c) - log ref(r)))` (arXiv:2305.18290, equation 7).

    Returns:
        pairs: n.
        accuracy: share of pairs with margin > 0.
        margin, margin_std, margin_median, reward_chosen, reward_rejected: over the pairs; a reward is beta (log pi - log ref).
        policy_accuracy: share of pairs whose chosen answer the model itself finds likelier; policy_accuracy_per_token: share of
            pairs whose chosen answer has the higher mean log-probability of a token.
        log_prob_chosen, log_prob_reject: means of the sums, nats.
        nats_per_token_chosen, nats_per_token_reject: means over pairs of an answer's negative log-likelihood of a token.
        tokens_chosen, tokens_reject: mean lengths.
        by_length: under chosen_longer, chosen_shorter and same_length the number of pairs and their three accuracies.
        length_correlation: of margin, log_prob_difference and log_prob_difference_per_token with the difference in length
            (Pearson); the margin's is near 1 for a model that has learned to prefer length.

        Accuracies count a tie up to rounding as one half.
    """
    log_probs, tokens = np.asarray(log_probs, float), np.asarray(tokens)
    means = log_probs / tokens
    total = tokens.sum(1)
    wins = {"accuracy": None, "policy_accuracy": won(log_probs[:, 0] - log_probs[:, 1], TIE * total),
            "policy_accuracy_per_token": won(means[:, 0] - means[:, 1], 2 * TIE)}
    margin = rewards = None
    if references is not None:
        rewards = beta * (log_probs - np.asarray(references, float))
        margin = rewards[:, 0] - rewards[:, 1]
        wins["accuracy"] = won(margin / beta, TIE * total)
    longer = tokens[:, 0] - tokens[:, 1]
    groups = {"chosen_longer": longer > 0, "chosen_shorter": longer < 0, "same_length": longer == 0}
    return {
        "pairs": len(tokens),
        "accuracy": _mean(wins["accuracy"]),
        "margin": _mean(margin),
        "margin_std": None if margin is None else float(margin.std()),
        "margin_median": None if margin is None else float(np.median(margin)),
        "reward_chosen": None if rewards is None else _mean(rewards[:, 0]),
        "reward_rejected": None if rewards is None else _mean(rewards[:, 1]),
        "policy_accuracy": _mean(wins["policy_accuracy"]),
        "policy_accuracy_per_token": _mean(wins["policy_accuracy_per_token"]),
        "log_prob_chosen": _mean(log_probs[:, 0]),
        "log_prob_reject": _mean(log_probs[:, 1]),
        "nats_per_token_chosen": _mean(-means[:, 0]),
        "nats_per_token_reject": _mean(-means[:, 1]),
        "tokens_chosen": _mean(tokens[:, 0]),
        "tokens_reject": _mean(tokens[:, 1]),
        "by_length": {name: {"pairs": int(among.sum())} | {what: _mean(values if values is None else values[among])
                                                           for what, values in wins.items()}
                      for name, among in groups.items()},
        "length_correlation": {
            "margin": _correlation(margin, longer),
            "log_prob_difference": _correlation(log_probs[:, 0] - log_probs[:, 1], longer),
            "log_prob_difference_per_token": _correlation(means[:, 0] - means[:, 1], longer),
        },
    }


def won(difference: Vector, tie: Vector | float) -> Vector:
    """1 where a difference is above 0, 0 where it is below, one half where it is a tie up to rounding; arrays or tensors."""
    return (difference > tie) + 0.5 * (abs(difference) <= tie)


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None or not len(values) else float(values.mean())


def _correlation(values: np.ndarray | None, lengths: np.ndarray) -> float | None:
    """Pearson's; None if either does not vary."""
    if values is None or not values.std() or not lengths.std():
        return None
    return float(np.corrcoef(values, lengths)[0, 1])
