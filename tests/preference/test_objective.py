"""The loss on real models: margin 0 at the start, and value and gradients against DPO written out in float64."""

import math

import pytest
import torch

from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import auto_layer_profile
from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.data.packing import Text, pack_pairs, pack_texts
from src.evaluation.held_out import evaluate_pairs
from src.model import build_model
from src.preference.entries import Pair
from src.preference.objective import Objective, pair_losses, text_losses
from src.preference.pairs import load_pairs
from src.quantization.strategy import PRECISIONS
from tests.conftest import prepare_csv
from tests.plain_model import log_probs
from tests.training.plain_steps import pair_numbers


def policy(checkpoint, dtype, quantization=None):
    weights = load_checkpoint(checkpoint)
    model = build_model(weights, read_dimensions(weights, str(checkpoint)), dtype, quantize=quantization)
    settings = auto_layer_profile(2, 1e-3, 1e-4, rank=4, alpha=8.0)
    apply_layer_profile(model, settings, seed=0)
    return model, settings


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(("precision", "quantization"),
                         [("fp32", None), ("bf16", None), ("fp32", "nf4"), ("bf16", "nf4"), ("bf16", "int8")])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_before_the_first_step_the_policy_is_the_reference(material, tiny_checkpoints, tmp_path, version, precision, quantization,
                                                           kind):
    checkpoint = tiny_checkpoints(version, kind, 32)
    prepare_csv(checkpoint, material / "pairs.csv", tmp_path / "pairs.save", precision, quantization)
    pairs, _, _ = load_pairs(tmp_path / "pairs.save", 256, 512)
    model, _ = policy(checkpoint, PRECISIONS[precision], quantization)
    # Other batches than those the references were computed in, so that only the model can make them agree.
    for batch in (pairs[:1], pairs[1:4], pairs[4:]):
        losses = pair_losses(model, pack_pairs(batch), [pair[3:5] for pair in batch], Objective({"beta": 0.1}, alpha=0.0))
        tokens = losses["answer_tokens"]
        # In float32 sums of hundreds of nats round at 1e-5; in bf16 products of another shape may round another way,
        # which moves a token's log-probability by up to a hundredth of a nat.
        nats = 2e-5 if precision == "fp32" else 1e-2
        assert (losses["margin"].abs() <= 0.1 * nats * tokens).all()
        assert (losses["loss"] - math.log(2)).abs().max() <= 0.05 * nats * tokens.max()


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("sft_on_prompt", [False, True])
@pytest.mark.parametrize("grad_cp", [False, True])
def test_loss_and_gradients_equal_dpo_written_out_in_float64(material, prepared, version, sft_on_prompt, grad_cp):
    pairs = load_pairs(prepared(version), 256, 512)[0][:3]
    beta, alpha = 0.3, 0.2
    exact, _ = policy(material / f"{version}.pth", torch.float64)
    generator = torch.Generator().manual_seed(1)
    trained = [name for name, parameter in exact.named_parameters() if parameter.requires_grad]
    start = {name: torch.randn(exact.get_parameter(name).shape, generator=generator) * 0.05 for name in trained}
    for name in trained:
        exact.get_parameter(name).data = start[name].double()

    def log_probs(prompt, answer):
        tokens = torch.tensor(prompt + answer)
        logits = exact.logits(exact(tokens[:-1])[0])
        every = torch.log_softmax(logits, -1)[torch.arange(len(tokens) - 1), tokens[1:]]
        return every[len(prompt) - 1:].sum(), every[:len(prompt) - 1].sum()

    expected = 0.0
    for prompt, chosen, reject, reference_chosen, reference_reject, *_ in pairs:
        (c, c_prompt), (r, _) = log_probs(prompt, chosen), log_probs(prompt, reject)
        margin = beta * ((c - r) - (reference_chosen - reference_reject))
        nll = -(c + c_prompt) / (len(prompt) - 1 + len(chosen)) if sft_on_prompt else -c / len(chosen)
        expected = expected + (torch.log1p(torch.exp(-margin)) + alpha * nll) / len(pairs)
    gradients = torch.autograd.grad(expected, [exact.get_parameter(name) for name in trained])

    model, _ = policy(material / f"{version}.pth", torch.float32)
    for name in trained:
        model.get_parameter(name).data = start[name].clone()
    objective = Objective({"beta": beta}, alpha, sft_on_prompt)
    losses = pair_losses(model, pack_pairs(pairs), [pair[3:5] for pair in pairs], objective, grad_cp)
    loss = losses["loss"].mean()
    loss.backward()
    # Float32 carries 1e-7; sums over some hundred tokens of a random model lose two digits of it.
    assert abs(loss.item() - expected.item()) < 1e-5 * abs(expected.item())
    for name, gradient in zip(trained, gradients, strict=True):
        assert (model.get_parameter(name).grad - gradient).norm() < 1e-4 * gradient.norm(), name


def test_evaluation_is_the_mean_over_pairs_and_ties_count_half(material, prepared):
    pairs, _, _ = load_pairs(prepared("x070"), 256, 512)
    model, _ = policy(material / "x070.pth", torch.float32)
    before = evaluate_pairs(model, pairs, Objective({"beta": 0.1}, alpha=0.5))
    assert before["accuracy"] == 0.5
    assert before["pairs"] == len(pairs) == 12
    assert abs(before["loss"] - math.log(2) - 0.5 * before["sft_loss"]) < 1e-5
    # References moved by one nat in the policy's favour, for a quarter of the pairs: these and no others are won.
    moved = [pair._replace(chosen_base_prob=pair.chosen_base_prob - 1.0) if n < 3 else pair for n, pair in enumerate(pairs)]
    after = evaluate_pairs(model, moved, Objective({"beta": 0.1}, alpha=0.5))
    assert after["accuracy"] == 0.25 + 0.75 * 0.5
    assert abs(after["margin"] - 0.25 * 0.1) < 1e-5


@pytest.mark.parametrize(("flags", "objective"), [
    ({"dpo_beta": 0.3, "dpo_alpha": 0.2}, Objective({"beta": 0.3}, 0.2)),
    ({"dpo_beta": 0.3, "dpo_alpha": 0.2, "sft_on_prompt": 1, "label_smoothing": 0.3},
     Objective({"beta": 0.3, "label_smoothing": 0.3}, 0.2, sft_on_prompt=True)),
    ({"loss": "ipo", "dpo_beta": 0.7, "dpo_alpha": 0.2}, Objective({"beta": 0.7}, 0.2, loss="ipo")),
    ({"loss": "simpo", "simpo_beta": 1.5, "simpo_gamma": 0.7, "simpo_alpha": 0.2, "label_smoothing": 0.2},
     Objective({"beta": 1.5, "gamma": 0.7, "label_smoothing": 0.2}, 0.2, loss="simpo")),
    ({"loss": "simpo", "simpo_beta": 1.5, "simpo_gamma": 0.0, "simpo_alpha": 0.2},
     Objective({"beta": 1.5, "gamma": 0.0}, 0.2, loss="simpo")),
    ({"loss": "orpo", "orpo_alpha": 0.4}, Objective({"beta": 0.4}, 1.0, loss="orpo")),
], ids=lambda value: value.get("loss", "dpo") if isinstance(value, dict) else "")
def test_every_number_of_a_pair_by_hand(material, flags, objective):
    pairs = [Pair([5, 9, 2], [7, 1], [8], -9.0, -7.0), Pair([4], [3, 3, 6], [2, 7], -20.0, -8.0)]
    weights = load_checkpoint(material / "x070.pth")
    losses = pair_losses(build_model(weights, read_dimensions(weights, "x070")), pack_pairs(pairs), [pair[3:5] for pair in pairs],
                         objective)
    by_hand = [pair_numbers({name: x.double() for name, x in weights.items()}, pair[:5], flags) for pair in pairs]
    for name in by_hand[0].keys() - {"pref_accuracy", "count"}:
        # Float32 sums of some tens of nats.
        assert losses[name].tolist() == pytest.approx([numbers[name].item() for numbers in by_hand], rel=1e-4, abs=1e-5), name
    assert losses["answer_tokens"].tolist() == [3, 5]


def test_every_token_of_a_text_by_hand(material):
    tokens, trained = [5, 9, 2, 7], [True, False, True, True]
    weights = load_checkpoint(material / "x070.pth")
    losses = text_losses(build_model(weights, read_dimensions(weights, "x070")), pack_texts([Text(tokens, trained)]))
    by_hand = -log_probs({name: x.double() for name, x in weights.items()}, tokens)[torch.tensor(trained[1:])]
    assert losses.keys() == {"loss", "sft_loss"}
    for values in losses.values():
        assert values.tolist() == pytest.approx(by_hand.tolist(), rel=1e-5)
