"""KTO's loss against the paper's formula in float64 Python with `math` alone, and against TRL where it is installed; its
mismatched answers, its means by kind, and its balance."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import LayerSetting
from src.data.packing import pack_pairs
from src.data.token_lists import EMPTY, TokenPair
from src.model import build_model
from src.preference.entries import Pair
from src.preference.kto import (
    are_thumbs,
    balance,
    by_kind,
    kl_estimate,
    kl_part,
    mismatch,
    mismatched_answers,
    pack_mismatched,
    unpaired,
)
from src.preference.log_probs import answer_log_probs
from src.preference.loss import preference_loss, sft_loss
from src.preference.objective import Objective, pair_losses
from tests.plain_model import log_probs
from tests.random_checkpoint import random_weights
from tests.stored_pairs import stored_tokens
from tests.tiny import tiny_dimensions

SETTINGS = [(0.1, 1.0, 1.0), (0.1, 1.3, 0.4), (0.02, 0.7, 2.5), (1.5, 1.0, 3.0)]
N = 24


def thumbs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether each of N thumbs is up; [2, N] log-probabilities of policy and reference; [N] log-ratios of mismatched answers."""
    generator = torch.Generator().manual_seed(seed)
    reference = -torch.rand(N, generator=generator, dtype=torch.float64) * 300
    policy = reference + 10 * torch.randn(N, generator=generator, dtype=torch.float64)
    mismatched = 1.5 + 4 * torch.randn(N, generator=generator, dtype=torch.float64)
    return torch.rand(N, generator=generator) < 0.4, torch.stack((policy.clamp(max=-0.1), reference)), mismatched


def ours(up, policy, reference, kl, beta, desirable, undesirable):
    # The other answer's numbers are none of the loss's business.
    return preference_loss(
        "kto", policy_chosen=policy.where(up, -7.0), policy_reject=policy.where(~up, -5.0),
        reference_chosen=reference.where(up, 0.0), reference_reject=reference.where(~up, 0.5), chosen_tokens=up.long() * 9, kl=kl,
        beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def formula(up: bool, policy: float, reference: float, kl: float, beta: float, desirable: float, undesirable: float) -> float:
    """lambda_y - v(x, y) of equation 7, v being lambda_y times a sigmoid."""
    h = policy - reference
    return desirable * (1 - sigmoid(beta * (h - kl))) if up else undesirable * (1 - sigmoid(beta * (kl - h)))


@pytest.mark.parametrize(("beta", "desirable", "undesirable"), SETTINGS)
def test_values_and_gradients_are_the_papers(beta, desirable, undesirable):
    up, columns, mismatched = thumbs()
    kl = kl_estimate(mismatched.mean())
    assert kl.item() == pytest.approx(max(0.0, sum(mismatched.tolist()) / N)) and kl > 0
    policy = columns[0].clone().requires_grad_()
    losses, chosen, rejected, margin = ours(up, policy, columns[1], kl, beta, desirable, undesirable)
    losses.sum().backward()
    step = 1e-4
    for at, (is_up, (now, before)) in enumerate(zip(up.tolist(), columns.T.tolist(), strict=True)):
        rest = before, kl.item(), beta, desirable, undesirable
        # 1 - sigmoid loses digits where the loss is next to 0; ours does not.
        assert losses[at].item() == pytest.approx(formula(is_up, now, *rest), rel=1e-9, abs=1e-15)
        rise = formula(is_up, now + step, *rest) - formula(is_up, now - step, *rest)
        assert policy.grad[at].item() == pytest.approx(rise / (2 * step), rel=1e-6, abs=1e-9)
        reward = beta * (now - before)
        assert (chosen[at].item(), rejected[at].item()) == pytest.approx((reward, 0.0) if is_up else (0.0, reward))
        assert margin[at].item() == pytest.approx((reward - beta * kl.item()) * (1 if is_up else -1))


def test_the_kl_is_never_below_0():
    assert kl_estimate(torch.tensor(-3.0)) == 0 and kl_estimate(torch.tensor(0.25)) == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_known_by_heart_or_impossible_stay_finite(dtype):
    for up in (torch.tensor([True] * 4), torch.tensor([False] * 4)):
        policy = torch.tensor([0.0, -1e-9, -5e3, -5e3], dtype=dtype, requires_grad=True)
        reference = torch.tensor([-5e3, 0.0, 0.0, -5e3], dtype=dtype)
        vectors = ours(up, policy, reference, torch.tensor(2.0, dtype=torch.float64), 1.0, 1.0, 2.0)
        gradient, = torch.autograd.grad(vectors[0].sum(), policy)
        assert all(vector.dtype == dtype and torch.isfinite(vector).all() for vector in (*vectors, gradient))


def trl_kto(up, policy, reference, mismatched, beta, desirable, undesirable):
    """TRL's loss and its metrics. Its trainer is not built: the method that holds the formula is called on a stand-in."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="trl is not installed").KTOTrainer
    if not hasattr(trainer, "_compute_loss"):
        pytest.skip("another trl than this test was written for (1.16)")

    class Metrics(dict):
        def __missing__(self, name):
            return self.setdefault(name, [])

    class Model:
        training = True

        def __call__(self, **_):
            zeros = torch.zeros(N, 1, dtype=torch.float64)
            return SimpleNamespace(log_probs=policy[:, None], entropy=zeros, mean_logits=zeros)

    whole = torch.tensor([[0, 1]]).expand(N, 2)  # a prompt of one token, an answer of one
    model, reference_of_mismatched = Model(), torch.linspace(-90, -10, N, dtype=torch.float64)
    stand_in = SimpleNamespace(
        model=model, aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=beta,
        desirable_weight=desirable, undesirable_weight=undesirable, _metrics={"train": Metrics()}, _total_train_tokens=0,
        _tp_size=1, _compute_kl_logps=lambda *_: reference_of_mismatched + mismatched,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x))
    loss = trainer._compute_loss(stand_in, model, {
        "input_ids": whole, "attention_mask": torch.ones_like(whole), "completion_mask": whole, "label": up,
        "ref_logps": reference, "ref_KL_logps": reference_of_mismatched}, False)
    return loss, {name: values[0] for name, values in stand_in._metrics["train"].items() if isinstance(values, list)}


@pytest.mark.parametrize("shift", [0.0, -9.0])
@pytest.mark.parametrize(("beta", "desirable", "undesirable"), SETTINGS)
def test_values_gradients_and_metrics_are_trls(beta, desirable, undesirable, shift):
    up, columns, mismatched = thumbs(seed=3)
    mismatched = mismatched + shift
    mine, theirs = (columns[0].clone().requires_grad_() for _ in range(2))
    expected, metrics = trl_kto(up, theirs, columns[1], mismatched, beta, desirable, undesirable)
    kl = kl_estimate(mismatched.mean())
    assert (kl > 0) == (shift == 0) and kl.item() == pytest.approx(metrics["kl"])
    losses, chosen, rejected, margin = ours(up, mine, columns[1], kl, beta, desirable, undesirable)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(losses.mean(), mine)[0], torch.autograd.grad(expected, theirs)[0],
                               rtol=1e-9, atol=1e-13)
    means = by_kind({
        "reward_chosen": chosen.mean().item(), "reward_rejected": rejected.mean().item(), "margin": margin.mean().item(),
        "sft_loss": 0.0, "desirable": up.double().mean().item(), "undesirable": (~up).double().mean().item()})
    assert (means["reward_chosen"], means["reward_rejected"], means["margin"]) == pytest.approx(
        (metrics["rewards/chosen"], metrics["rewards/rejected"], metrics["rewards/margins"]))


def test_means_are_over_the_thumbs_of_a_kind_and_missing_without_any():
    # Two up with rewards 1 and 2 and an SFT loss of 3 and 5, three down with a reward of -1 each.
    means = {"loss": 9.0, "reward_chosen": 3 / 5, "reward_rejected": -3 / 5, "sft_loss": 8 / 5, "margin": 7.0, "kl": 0.5}
    assert by_kind(means | {"desirable": 2 / 5, "undesirable": 3 / 5}) == pytest.approx(
        {"loss": 9.0, "reward_chosen": 1.5, "reward_rejected": -1.0, "sft_loss": 4.0, "margin": 2.5, "kl": 0.5})
    assert by_kind(means | {"desirable": 1.0, "undesirable": 0.0}) == pytest.approx(
        {"loss": 9.0, "reward_chosen": 0.6, "sft_loss": 1.6, "kl": 0.5})
    assert by_kind(means | {"desirable": 0.0, "undesirable": 1.0}) == pytest.approx(
        {"loss": 9.0, "reward_rejected": -0.6, "kl": 0.5})


@given(prompts=st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(lambda prompts: len(set(prompts)) > 1),
       seed=st.integers(0, 2**32))
def test_no_example_is_seen_with_an_answer_to_its_own_prompt(prompts, seed):
    taken = mismatch(np.array(prompts), seed).tolist()
    assert len(taken) == len(prompts) and all(prompts[one] != prompts[other] for one, other in enumerate(taken))
    assert taken == mismatch(np.array(prompts), seed).tolist()
    most, uses = max(Counter(prompts).values()), Counter(taken)
    if 2 * most <= len(prompts):
        assert set(uses.values()) == {1} and len(uses) == len(prompts)
    else:  # as evenly as it can be
        assert max(uses.values()) <= -(-most // (len(prompts) - most))


def test_seeds_differ_and_one_prompt_has_no_other():
    assert len({tuple(mismatch(np.arange(20), seed)) for seed in range(5)}) == 5
    assert len(mismatch(np.arange(0), 0)) == 0
    for alone in ([7], [7, 7, 7]):
        with pytest.raises(ValueError):
            mismatch(np.array(alone), 0)


def test_mismatched_answers_fit_and_go_to_thumbs_alone():
    pairs = [TokenPair([1] * 4, [10, 11, 12], []), TokenPair([2] * 8, [], [20, 21]), TokenPair([3], [5], [6]),
             TokenPair([4] * 3, [], [30])]
    for seed in range(5):
        tokens = stored_tokens(pairs)
        kl = [tokens.lists[number] for number in mismatched_answers(tokens, np.arange(4), seed, max_len=10).kl]
        answers = {0: [10, 11, 12], 1: [20, 21], 3: [30]}
        assert kl[2] == []
        for at in (0, 1, 3):
            assert any(kl[at] == answer[:10 - len(pairs[at].prompt)] for other, answer in answers.items() if other != at)
            assert len(kl[at]) + len(pairs[at].prompt) <= 10
    assert mismatched_answers(stored_tokens(pairs[2:3]), np.arange(1), 0, 10).kl.tolist() == [EMPTY]


def test_a_mismatched_answer_keeps_the_beginning_of_its_loss():
    tokens = stored_tokens([TokenPair([1], [10, 11, 12], [], 2), TokenPair([2], [], [20, 21], 0, 1)])
    found = mismatched_answers(tokens, np.arange(2), seed=0, max_len=10)
    assert [tokens.lists[number] for number in found.kl] == [[20, 21], [10, 11, 12]] and found.kl_from.tolist() == [1, 2]
    tokens = stored_tokens([TokenPair([1], [10, 11, 12], [], 2), TokenPair([2] * 8, [], [20])])
    found = mismatched_answers(tokens, np.arange(2), seed=0, max_len=10)
    assert tokens.lists[found.kl[1]] == [10, 11] and found.kl_from.tolist() == [0, 1]  # its last token alone has a loss


@pytest.mark.parametrize("training", [True, False])
def test_the_kl_is_without_dropout_and_draws_no_random_numbers(training):
    dimensions = tiny_dimensions("x070", 8)
    model = build_model(random_weights(dimensions), dimensions)
    apply_layer_profile(model, [LayerSetting("emb", "freeze"), *(LayerSetting(block, "lora", rank=4, alpha=8, dropout=0.5)
                                                                 for block in "01"), LayerSetting("head", "freeze")], 0)
    for parameter in model.parameters():
        parameter.data.add_(0.05)  # an adapter that is nothing would drop nothing
    thumbs = [Pair([1, 2], [3], [], -1.0, 0.0, kl=[4, 5, 6], kl_base_prob=-7.0), Pair([8], [], [9], 0.0, -1.0, kl=[10])]
    expected = sum(answer_log_probs(model.eval(), pack_pairs([TokenPair(thumb.prompt, thumb.kl, [])])).answer[0].item()
                   - thumb.kl_base_prob for thumb in thumbs)
    model.train(training)
    before = torch.get_rng_state()
    part = kl_part(model, *pack_mismatched(thumbs), share=0.25)
    assert part.item() == pytest.approx(0.25 * expected, rel=1e-5) and part.dtype == torch.float64 and not part.requires_grad
    assert model.training == training and torch.equal(torch.get_rng_state(), before)


def test_the_kl_leaves_out_what_has_no_loss():
    dimensions = tiny_dimensions("x070", 8)
    weights = random_weights(dimensions)
    plain = log_probs({name: tensor.double() for name, tensor in weights.items()}, [1, 2, 4, 5, 6])
    thumb = Pair([1, 2], [3], [], -1.0, 0.0, kl=[4, 5, 6], kl_base_prob=-7.0, kl_from=1)
    part = kl_part(build_model(weights, dimensions), *pack_mismatched([thumb]), share=1.0)
    assert part.item() == pytest.approx((plain[-2:].sum() + 7.0).item(), abs=1e-4)


@pytest.mark.parametrize("sft_on_prompt", [False, True])
def test_a_thumb_down_has_no_sft_loss_even_of_its_prompt(sft_on_prompt):
    dimensions = tiny_dimensions("x070", 8)
    weights = random_weights(dimensions)
    thumbs = [Pair([1, 2], [3], [], -1.0, 0.0), Pair([8, 7], [], [9], 0.0, -1.0), Pair([6], [], [5], 0.0, -1.0)]
    objective = Objective({"beta": 0.1}, 0.7, sft_on_prompt, "kto").with_kl(torch.tensor(0.5))
    losses = pair_losses(build_model(weights, dimensions), pack_pairs(thumbs), [pair[3:5] for pair in thumbs], objective)
    plain = -log_probs({name: tensor.double() for name, tensor in weights.items()}, [1, 2, 3])
    expected = (plain.mean() if sft_on_prompt else plain[-1]).item()
    assert losses["sft_loss"].tolist() == pytest.approx([expected, 0.0, 0.0], rel=1e-5)
    assert torch.equal(losses["loss"], losses["preference_loss"] + 0.7 * losses["sft_loss"])
    assert losses["kl"].tolist() == [0.5] * 3 and losses["desirable"].tolist() == [1, 0, 0]
    assert losses["undesirable"].tolist() == [0, 1, 1]
    assert sft_loss(torch.tensor([0.0, -3.0]), torch.tensor([0, 2])).tolist() == [0.0, 1.5]


def test_a_pair_is_a_thumb_up_and_a_thumb_down():
    pair = TokenPair([1], [2, 3], [4, 5, 6], 1, 2)
    up, down = TokenPair([1], [2, 3], [], 1, 0), TokenPair([1], [], [4, 5, 6], 0, 2)
    found, of = unpaired(stored_tokens([down, pair, pair, up]))
    assert found == [down, up, down, up, down, up] and of.tolist() == [0, 1, 1, 2, 2, 3]
    assert are_thumbs(stored_tokens([pair, up, down])).tolist() == [False, True, True]


@pytest.mark.parametrize("up, down, desirable, undesirable, flag", [
    (10, 10, 1.0, 1.0, None), (4, 3, 1.0, 1.0, None), (10, 100, 10.0, 1.0, None), (10, 100, 1.0, 1.0, "desirable"),
    (99, 100, 1.0, 1.0, "desirable"), (100, 10, 1.0, 1.0, "undesirable"), (41, 30, 1.0, 1.0, "undesirable"),
    (5, 7, 3.0, 0.01, "undesirable"), (1, 100_000, 1.0, 1.0, "desirable"),
])
def test_the_weight_that_is_suggested_balances(up, down, desirable, undesirable, flag):
    line = balance(up, down, desirable, undesirable)
    if flag is None:
        assert line is None
        return
    assert line.startswith(f"{up} thumbs up and {down} down, ")
    *_, name, weight = line.split()
    assert name == f"--kto_{flag}_weight"
    weights = {"desirable": desirable, "undesirable": undesirable} | {flag: float(weight)}
    assert balance(up, down, weights["desirable"], weights["undesirable"]) is None


def test_one_kind_alone_is_told():
    assert "not to do" in balance(0, 5, 1.0, 1.0) and "what to do" in balance(5, 0, 1.0, 1.0)
