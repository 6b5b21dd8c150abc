"""Accuracies, margins and length bias against numbers made by hand, and against numpy's own statistics."""

import json

import numpy as np
import pytest

from src.evaluation.measures import preference_measures


def test_four_pairs_by_hand():
    log_probs = np.array([[-10.0, -20.0], [-30.0, -12.0], [-8.0, -9.0], [-6.0, -6.0]])
    references = np.array([[-12.0, -20.0], [-32.0, -13.0], [-7.0, -9.0], [-6.0, -6.0]])
    tokens = np.array([[5, 10], [20, 6], [4, 4], [3, 3]])
    found = preference_measures(log_probs, references, tokens, beta=0.5)
    # Log-ratios: 2 - 0, 2 - 1, -1 - 0, 0 - 0.
    assert found["pairs"] == 4 and found["accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert found["margin"] == 0.5 * (2 + 1 - 1 + 0) / 4 and found["margin_median"] == 0.25
    assert found["reward_chosen"] == 0.5 * (2 + 2 - 1 + 0) / 4 and found["reward_rejected"] == 0.5 * (0 + 1 + 0 + 0) / 4
    # Sums: won, lost, won, a tie. A token: -2 and -2, -1.5 and -2, -2 and -2.25, -2 and -2.
    assert found["policy_accuracy"] == (1 + 0 + 1 + 0.5) / 4
    assert found["policy_accuracy_per_token"] == (0.5 + 1 + 1 + 0.5) / 4
    assert found["nats_per_token_chosen"] == (2 + 1.5 + 2 + 2) / 4 and found["log_prob_reject"] == -47 / 4
    assert found["tokens_chosen"] == 8 and found["tokens_reject"] == 23 / 4
    assert found["by_length"] == {
        "chosen_longer": {"pairs": 1, "accuracy": 1.0, "policy_accuracy": 0.0, "policy_accuracy_per_token": 1.0},
        "chosen_shorter": {"pairs": 1, "accuracy": 1.0, "policy_accuracy": 1.0, "policy_accuracy_per_token": 0.5},
        "same_length": {"pairs": 2, "accuracy": 0.25, "policy_accuracy": 0.75, "policy_accuracy_per_token": 0.75}}


def test_a_model_that_prefers_length_alone_is_found_out():
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 200, (300, 2))
    references = -1.5 * tokens
    # A bonus for each token of an answer, and nothing else.
    found = preference_measures(references + 0.1 * tokens, references, tokens, beta=0.1)
    assert found["length_correlation"]["margin"] == pytest.approx(1.0)
    assert found["by_length"]["chosen_longer"]["accuracy"] == 1.0 and found["by_length"]["chosen_shorter"]["accuracy"] == 0.0
    assert found["length_correlation"]["log_prob_difference"] == pytest.approx(-1.0)
    blind = preference_measures(references + generator.normal(0, 5, (300, 2)), references, tokens, beta=0.1)
    assert abs(blind["length_correlation"]["margin"]) < 0.2


def test_correlations_are_pearsons():
    generator = np.random.default_rng(1)
    tokens = generator.integers(2, 50, (40, 2))
    log_probs, references = -tokens * generator.uniform(0.5, 2, (2, 40, 2))
    found = preference_measures(log_probs, references, tokens, 0.3)["length_correlation"]
    longer = tokens[:, 0] - tokens[:, 1]
    for name, values in (("margin", (log_probs - references) @ [1, -1]), ("log_prob_difference", log_probs @ [1, -1]),
                         ("log_prob_difference_per_token", (log_probs / tokens) @ [1, -1])):
        assert found[name] == pytest.approx(np.corrcoef(values, longer)[0, 1])


def test_what_cannot_be_told_is_none_and_json_can_hold_it():
    found = preference_measures(np.array([[-1.0, -2.0]]), None, np.array([[3, 3]]), 0.1)
    assert {name for name, value in found.items() if value is None} == {
        "accuracy", "margin", "margin_std", "margin_median", "reward_chosen", "reward_rejected"}
    assert set(found["length_correlation"].values()) == {None}
    assert found["by_length"]["chosen_longer"] == {"pairs": 0, "accuracy": None, "policy_accuracy": None,
                                                   "policy_accuracy_per_token": None}
    json.dumps(found, allow_nan=False)


def test_rounding_is_a_tie():
    tokens = np.array([[100, 100], [100, 100]])
    references = np.array([[-150.0, -160.0], [-150.0, -160.0]])
    found = preference_measures(references + np.array([[0.01, 0.0], [0.03, 0.0]]), references, tokens, beta=2.0)
    assert found["accuracy"] == 0.75
