"""Sums over answers against the model written out in float64 (tests/plain_model.py), and what a backward computes again."""

import pytest
import torch

from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.data.packing import Text, pack_pairs, pack_texts
from src.data.token_lists import TokenPair
from src.model import build_model
from src.preference.log_probs import answer_log_probs
from src.preference.objective import Objective, pair_losses, text_losses
from tests import plain_model

PAIRS = [TokenPair([5, 9, 2], [7, 1], [8]), TokenPair([4], [3, 3, 6], [2, 7]), TokenPair([5, 9, 2], [1], [6, 6, 6])]


@pytest.fixture(params=["x060", "x070"])
def model(request, material):
    weights = load_checkpoint(material / f"{request.param}.pth")
    return build_model(weights, read_dimensions(weights, request.param)), {name: x.double() for name, x in weights.items()}


@pytest.mark.parametrize("asked", [{}, {"with_prompt": False}, {"with_prompt": True}])
def test_sums_and_counts_of_answers_and_where_asked_of_prompts(model, asked):
    sums = answer_log_probs(model[0], pack_pairs(PAIRS), **asked)
    of_answers, of_prompts, counts = [], [], []
    for prompt, *answers in (pair[:3] for pair in PAIRS):
        for answer in answers:
            values = plain_model.log_probs(model[1], prompt + answer)
            of_answers.append(values[len(prompt) - 1:].sum())
            of_prompts.append(values[:len(prompt) - 1].sum() if asked.get("with_prompt") else torch.tensor(0.0))
            # The first token of a prompt has nothing before it.
            counts.append((len(answer), len(prompt) - 1 if asked.get("with_prompt") else 0))
    # Float32 sums of some tens of nats.
    assert sums.answer.tolist() == pytest.approx([value.item() for value in of_answers], rel=1e-5)
    assert sums.prompt.tolist() == pytest.approx([value.item() for value in of_prompts], rel=1e-5)
    assert list(zip(sums.answer_tokens.tolist(), sums.prompt_tokens.tolist(), strict=True)) == counts


THUMBS = [TokenPair([5, 9, 2], [7, 1, 3], [], 2), TokenPair([4], [], [2, 7]), TokenPair([5, 9, 2], [], [6, 6, 6], 0, 1),
          TokenPair([8, 8], [1, 2, 3, 4], [5, 6], 3, 1)]


@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_sums_are_over_the_tokens_that_have_a_loss_and_0_for_an_answer_that_is_not_there(model, with_prompt, grad_cp):
    trained = model[0].requires_grad_(True)
    sums = answer_log_probs(trained, pack_pairs(THUMBS), with_prompt, grad_cp)
    weights = {name: x.clone().requires_grad_(name == "blocks.1.att.key.weight") for name, x in model[1].items()}
    expected, counts, total = [], [], torch.tensor(0.0)
    for number, (prompt, chosen, reject, *starts) in enumerate(THUMBS):
        for which, (answer, start) in enumerate(zip((chosen, reject), starts, strict=True)):
            value = torch.tensor(0.0)
            if answer:
                value = plain_model.log_probs(weights, prompt + answer)[len(prompt) - 1 + start:].sum()
            expected.append(value.item())
            counts.append(len(answer) - start if answer else 0)
            total = total + (1 + number + 10 * which) * value
    assert sums.answer.tolist() == pytest.approx(expected, rel=1e-5) and sums.answer_tokens.tolist() == counts
    factors = torch.tensor([1.0 + number + 10 * which for number in range(len(THUMBS)) for which in range(2)])
    (sums.answer * factors).sum().backward()
    right, = torch.autograd.grad(total, weights["blocks.1.att.key.weight"])
    found = trained.get_parameter("blocks.1.att.key.weight").grad
    assert right.norm() > 0 and (found - right).norm() < 1e-4 * right.norm()


@pytest.mark.parametrize("of", ["pairs", "texts"])
@pytest.mark.parametrize(("asked", "times"), [({}, 1), ({"grad_cp": False}, 1), ({"grad_cp": True}, 2)])
def test_blocks_are_computed_again_in_the_backward_only_where_asked(material, of, asked, times):
    weights = load_checkpoint(material / "x070.pth")
    model, calls = build_model(weights, read_dimensions(weights, "x070")).requires_grad_(True), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    if of == "pairs":
        losses = pair_losses(model, pack_pairs(PAIRS), [(-1.0, -1.0)] * len(PAIRS), Objective({"beta": 0.1}, 0.1), **asked)
    else:
        losses = text_losses(model, pack_texts([Text([1, 2, 3], [True] * 3)]), **asked)
    losses["loss"].sum().backward()
    assert len(calls) == times
