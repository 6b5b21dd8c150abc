"""Every preference loss against its paper's formula, stated again in float64 Python with `math` alone, values and gradients.

Where `trl` is installed, its own code computes the same losses from the same log-probabilities.
"""

import math
from argparse import ArgumentTypeError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from src.preference.loss import LOSSES, loss_flags, needs_reference, preference_loss, takes, without_reference

NAMES = ("policy_chosen", "policy_reject", "reference_chosen", "reference_reject", "chosen_tokens", "reject_tokens")
SETTINGS = [("dpo", 0.1, 0.0, 0.0), ("dpo", 0.05, 0.0, 0.2), ("ipo", 0.1, 0.0, 0.0), ("ipo", 2.0, 0.0, 0.0),
            ("hinge", 0.1, 0.0, 0.0), ("robust", 0.1, 0.0, 0.1), ("robust", 0.02, 0.0, 0.4), ("simpo", 2.0, 1.0, 0.0),
            ("simpo", 10.0, 0.0, 0.1), ("cpo", 0.1, 0.0, 0.0), ("cpo", 0.01, 0.0, 0.3), ("orpo", 0.1, 0.0, 0.0),
            ("orpo", 1.0, 0.0, 0.0)]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def swapped(margin, e):
    """The expected loss where a label is wrong with probability e."""
    return -(1 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin)


def formula(loss, pc, pr, rc, rr, nc, nr, beta, gamma, e):
    """The published loss of one pair."""
    log_ratio = (pc - rc) - (pr - rr)
    if loss == "dpo":
        return swapped(beta * log_ratio, e)
    if loss == "robust":
        right, wrong = -log_sigmoid(beta * log_ratio), -log_sigmoid(-beta * log_ratio)
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    if loss == "hinge":
        return max(0.0, 1 - beta * log_ratio)
    if loss == "ipo":
        return ((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * beta)) ** 2
    if loss == "simpo":
        return swapped(beta / nc * pc - beta / nr * pr - gamma, e)
    if loss == "cpo":
        return swapped(beta * (pc - pr), e)
    assert loss == "orpo"
    p_chosen, p_reject = math.exp(pc / nc), math.exp(pr / nr)
    return -beta * log_sigmoid(math.log((p_chosen / (1 - p_chosen)) / (p_reject / (1 - p_reject))))


def pairs(n=40, seed=0):
    """[6, n] float64: answers of 3 to 300 tokens of about a nat each, the policy some nats off its reference."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, 300, (2, n))
    reference = -tokens * generator.uniform(0.3, 2.0, (2, n))
    policy = np.minimum(reference + generator.normal(0, 10, (2, n)), -0.05 * tokens)
    return torch.tensor(np.concatenate([policy, reference, tokens]))


def values_of(columns, beta, gamma, smoothing):
    return dict(zip(NAMES, columns, strict=True)) | {"beta": beta, "gamma": gamma, "label_smoothing": smoothing}


def test_every_loss_is_tried():
    assert {loss for loss, *_ in SETTINGS} == set(LOSSES) - {"kto"}  # of single answers: test_kto.py
    assert {loss for loss in LOSSES if not needs_reference(loss)} == set(without_reference()) == {"simpo", "orpo", "cpo"}


@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"), SETTINGS)
def test_values_against_the_formula(loss, beta, gamma, smoothing):
    columns = pairs()
    losses, chosen, rejected, margin = preference_loss(loss, **values_of(columns, beta, gamma, smoothing))
    expected = torch.tensor([formula(loss, *pair, beta, gamma, smoothing) for pair in columns.T.tolist()], dtype=torch.float64)
    # Rounding of float64 in sums of hundreds of nats, and in log(1 - p) for p up to exp(-0.05).
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(margin, chosen - rejected, rtol=1e-9, atol=1e-12)
    policy_chosen, policy_reject, reference_chosen, reference_reject, chosen_tokens, reject_tokens = columns
    for reward, policy, reference, tokens in ((chosen, policy_chosen, reference_chosen, chosen_tokens),
                                              (rejected, policy_reject, reference_reject, reject_tokens)):
        nats = policy - reference if needs_reference(loss) else policy
        torch.testing.assert_close(reward, beta * nats / (tokens if takes(loss, "chosen_tokens") else 1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "cpo"])
def test_labels_are_taken_to_be_right_where_nothing_else_is_said(loss):
    columns = pairs(10)
    values = values_of(columns, 0.1, 0.5, 0.0)
    del values["label_smoothing"]
    expected = torch.tensor([formula(loss, *pair, 0.1, 0.5, 0.0) for pair in columns.T.tolist()], dtype=torch.float64)
    torch.testing.assert_close(preference_loss(loss, **values)[0], expected, rtol=1e-10, atol=1e-13)


def test_what_each_loss_takes_by_default():
    """What README's tables of flags and losses promise of a run without these flags."""
    assert {name: flag.default for name, flag in loss_flags().items()} == {
        "dpo_beta": 0.01, "dpo_alpha": 0.1, "label_smoothing": 0.0, "simpo_beta": 2.0, "simpo_gamma": 1.0, "simpo_alpha": 0.0,
        "orpo_alpha": 0.1, "cpo_beta": 0.1, "cpo_alpha": 1.0, "kto_beta": 0.1, "kto_desirable_weight": 1.0,
        "kto_undesirable_weight": 1.0, "kto_alpha": 0.0}
    assert [LOSSES[loss].sft_share and LOSSES[loss].sft_share.name for loss in LOSSES] == [
        "dpo_alpha", "dpo_alpha", "dpo_alpha", "dpo_alpha", "simpo_alpha", None, "cpo_alpha", "kto_alpha"]
    assert {loss: {name: setting.name for name, setting in LOSSES[loss].settings.items()} for loss in LOSSES} == {
        "dpo": {"beta": "dpo_beta", "label_smoothing": "label_smoothing"}, "ipo": {"beta": "dpo_beta"},
        "hinge": {"beta": "dpo_beta"}, "robust": {"beta": "dpo_beta", "label_smoothing": "label_smoothing"},
        "simpo": {"beta": "simpo_beta", "gamma": "simpo_gamma", "label_smoothing": "label_smoothing"},
        "orpo": {"beta": "orpo_alpha"}, "cpo": {"beta": "cpo_beta", "label_smoothing": "label_smoothing"},
        "kto": {"beta": "kto_beta", "desirable_weight": "kto_desirable_weight", "undesirable_weight": "kto_undesirable_weight"}}
    takers = {name: flag.help.split(": ")[0] for name, flag in loss_flags().items()}
    assert takers["label_smoothing"] == "dpo, robust, simpo, cpo" and takers["simpo_gamma"] == "simpo"


def test_labels_are_right_more_often_than_not():
    """With labels that are swapped in half of the pairs there is nothing to learn, and the robust loss divides by 0."""
    read = loss_flags()["label_smoothing"].read
    assert [read(text) for text in ("0", "1e-6", "0.3", "0.4999")] == [0.0, 1e-6, 0.3, 0.4999]
    for text in ("-0.1", "0.5", "1"):
        with pytest.raises(ArgumentTypeError):
            read(text)


@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"), SETTINGS)
def test_gradients_against_central_differences(loss, beta, gamma, smoothing):
    columns = pairs()
    policy = columns[:2].clone().requires_grad_()
    preference_loss(loss, **values_of([*policy, *columns[2:]], beta, gamma, smoothing))[0].sum().backward()
    step = 1e-4
    for which in range(2):
        for number, pair in enumerate(columns.T.tolist()):
            if loss == "hinge" and abs(1 - beta * ((pair[0] - pair[2]) - (pair[1] - pair[3]))) < beta * step:
                continue  # the kink has no derivative
            above, below = list(pair), list(pair)
            above[which] += step
            below[which] -= step
            rise = formula(loss, *above, beta, gamma, smoothing) - formula(loss, *below, beta, gamma, smoothing)
            # Differences err by step^2 times the third derivative and by rounding, 1e-16 * loss / step: under 1e-8 here.
            assert policy.grad[which, number].item() == pytest.approx(rise / (2 * step), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"), SETTINGS)
def test_autograd_of_every_vector_passes_gradcheck(loss, beta, gamma, smoothing):
    columns = pairs(6, seed=1)
    policy = [column.clone().requires_grad_() for column in columns[:2]]

    def losses(chosen, reject):
        return preference_loss(loss, **values_of([chosen, reject, *columns[2:]], beta, gamma, smoothing))[0]

    assert torch.autograd.gradcheck(losses, policy)


@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"), SETTINGS)
def test_float32_and_half_inputs(loss, beta, gamma, smoothing):
    columns = pairs()
    exact = preference_loss(loss, **values_of(columns, beta, gamma, smoothing))[0]
    single = preference_loss(loss, **values_of(columns.float(), beta, gamma, smoothing))[0]
    assert single.dtype == torch.float32
    # Sums of up to 600 nats carry 3e-5 in float32, their differences as much: times beta (0.1 at most for losses on sums).
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)
    half = preference_loss(loss, **values_of(columns.bfloat16(), beta, gamma, smoothing))
    assert {vector.dtype for vector in half} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"), SETTINGS)
def test_answers_known_by_heart_or_impossible_stay_finite(loss, beta, gamma, smoothing, dtype):
    # log p = 0 (certain), a hair below it, and thousands of nats, in every combination.
    some = torch.tensor([0.0, -1e-9, -1e-4, -5e3], dtype=dtype)
    chosen, reject = (x.flatten().requires_grad_() for x in torch.meshgrid(some, some, indexing="ij"))
    tokens = torch.full_like(chosen, 10).detach()
    columns = [chosen, reject, torch.zeros_like(tokens), torch.zeros_like(tokens), tokens, tokens]
    losses, *others = preference_loss(loss, **values_of(columns, beta, gamma, smoothing))
    gradients = torch.autograd.grad(losses.sum(), (chosen, reject))
    assert all(torch.isfinite(vector).all() for vector in (losses, *others, *gradients))


def test_the_odds_ratio_has_the_margins_sign():
    columns = pairs(200)
    _, _, _, margin = preference_loss("orpo", **values_of(columns, 0.1, 0.0, 0.0))
    losses = preference_loss("orpo", **values_of(columns, 1.0, 0.0, 0.0))[0]
    assert torch.equal(margin > 0, losses < math.log(2))


# From here on TRL. Its trainers are never built: their methods that hold the formulas are called on a stand-in that has the
# settings they read, and for DPO's, which asks its models for log-probabilities, on models that give back these ones.

def trl_dpo(loss_type, columns, beta, smoothing):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed").DPOTrainer
    if not hasattr(trainer, "_compute_loss"):
        pytest.skip("another trl than this test was written for (1.16)")
    tokens = columns[4:].long().flatten()
    completion = torch.arange(int(tokens.max()) + 1)[None] <= tokens[:, None]
    completion[:, 0] = False  # the prompt is one token

    class Model:
        training = True

        def __init__(self, sums):
            # Each answer's log-probability is spread evenly over its tokens.
            self.log_probs = completion[:, 1:] * (sums.flatten() / tokens)[:, None]

        def __call__(self, **_):
            zeros = torch.zeros_like(self.log_probs.detach())
            return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    class Metrics(dict):
        def __missing__(self, name):
            return self.setdefault(name, [])

    n = columns.shape[1]
    model = Model(columns[:2])
    stand_in = SimpleNamespace(
        model=model, ref_model=None, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, beta=beta,
        f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], label_smoothing=smoothing,
        use_weighting=False, _metrics={"train": Metrics()}, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x))
    loss = trainer._compute_loss(stand_in, model, {
        "input_ids": torch.zeros_like(completion, dtype=torch.int64), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion, "ref_chosen_logps": columns[2], "ref_rejected_logps": columns[3]}, False)
    return loss * n, (stand_in._metrics["train"]["rewards/chosen"][0], stand_in._metrics["train"]["rewards/rejected"][0])


def trl_cpo(loss_type, columns, beta, gamma, smoothing):
    trainer = pytest.importorskip("trl.experimental.cpo", reason="trl is not installed").CPOTrainer
    stand_in = SimpleNamespace(alpha=0.0, beta=beta, simpo_gamma=gamma, label_smoothing=smoothing, loss_type=loss_type,
                               accelerator=SimpleNamespace(device="cpu"))
    # What its get_batch_logps gives: sums, or means over the tokens for SimPO.
    sums = columns[:2] / columns[4:] if loss_type == "simpo" else columns[:2]
    losses, chosen, rejected = trainer.cpo_loss(stand_in, *sums)
    return losses.sum(), (chosen.mean().item(), rejected.mean().item())


def trl_orpo(columns, beta):
    trainer = pytest.importorskip("trl.experimental.orpo", reason="trl is not installed").ORPOTrainer
    stand_in = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    ratio, chosen, rejected, *_ = trainer.odds_ratio_loss(stand_in, *(columns[:2] / columns[4:]))
    return -ratio.sum(), (chosen.mean().item(), rejected.mean().item())


# TRL's DPO has no label smoothing any more outside of robust; its CPO has, in the same formula.
@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"),
                         [setting for setting in SETTINGS if setting[0] != "dpo" or not setting[3]])
def test_values_and_gradients_are_trls(loss, beta, gamma, smoothing, monkeypatch):
    columns = pairs(30, seed=2)
    ours, theirs = columns[:2].clone().requires_grad_(), columns[:2].clone().requires_grad_()
    losses, chosen, rejected, _ = preference_loss(loss, **values_of([*ours, *columns[2:]], beta, gamma, smoothing))
    column_stack = torch.cat([theirs, columns[2:]])
    if needs_reference(loss):
        expected, rewards = trl_dpo({"dpo": "sigmoid"}.get(loss, loss), column_stack, beta, smoothing)
    elif loss == "orpo":
        monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # it would round to float32
        expected, rewards = trl_orpo(column_stack, beta)
    else:
        expected, rewards = trl_cpo({"cpo": "sigmoid"}.get(loss, loss), column_stack, beta, gamma, smoothing)
    # The same float64 operations but for their order; TRL's tokens are sums of equal parts.
    torch.testing.assert_close(losses.sum(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), ours)[0], torch.autograd.grad(expected, theirs)[0],
                               rtol=1e-9, atol=1e-13)
    if loss != "ipo":  # there TRL logs rewards of sums, though the loss compares means
        assert (chosen.mean().item(), rejected.mean().item()) == pytest.approx(rewards, rel=1e-9)
