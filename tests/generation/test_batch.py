"""Batched generation: the package's tokens, no row's text changed by its neighbours, and every way to end an answer."""

import pytest
import torch

from src.checkpoint.io import save_checkpoint
from src.checkpoint.random import make_dimensions, random_weights
from src.errors import UserError
from src.generation.batch import Request, generate, prefill
from src.generation.config import Sampling
from src.model import State, build_model
from src.tokenizer import load_tokenizer
from tests.generation.tiny import PROMPTS, fixed_model, logits_of, random_model
from tests.rwkv_package import package_generate

BYTES = load_tokenizer("bytes")


def answers(model, sampling: Sampling, prompts=PROMPTS, seed=0, batch_size=4):
    """All answers by row number."""
    numbered = prompts if isinstance(prompts, dict) else dict(enumerate(prompts))
    requests = [Request(row, tuple(prompt)) for row, prompt in numbered.items()]
    found = list(generate(model, BYTES, requests, sampling, seed, batch_size))
    assert len(found) == len(numbered)
    return {answer.row: answer for answer in found}


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_greedy_tokens_are_the_packages(version, tmp_path):
    """With penalties, 50 tokens after each prompt. The prompts are read packed here, and one by one there."""
    dimensions = make_dimensions(version, n_layer=2, n_embd=64, head_size=16, vocab_size=256)
    weights = random_weights(dimensions, seed=3)
    save_checkpoint(weights, tmp_path / "tiny.pth")
    arguments = {"temperature": 0, "alpha_frequency": 1.0, "alpha_presence": 0.2, "alpha_decay": 0.996, "token_ban": [0]}
    expected = package_generate(tmp_path / "tiny.pth", version, [list(prompt) for prompt in PROMPTS], 50, arguments)
    ours = answers(build_model(weights, dimensions), Sampling(temperature=0, presence=0.2, max_tokens=50, stop=""))
    assert [ours[row].tokens for row in range(len(PROMPTS))] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


def test_greedy_tokens_are_the_argmax_of_the_model_alone():
    model = random_model("x070")
    ours = answers(model, Sampling(temperature=0, frequency=0, max_tokens=12, stop="", ban_end_of_text=False))
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(12):
            hidden, _ = model(torch.tensor(text))
            text.append(int(model.logits(hidden[-1]).argmax()))
        assert ours[row].tokens == text[len(prompt):]


def test_a_rows_answer_depends_on_seed_row_and_prompt_alone():
    """In float64, where the last bits that the batch's shape changes are out of reach of any outcome."""
    model, sampling = random_model("x070", torch.float64), Sampling(top_p=0.95, max_tokens=30, stop="e")
    model.head.weight[ord("e")] *= 5  # likely now and then, so that rows end at different times
    whole = answers(model, sampling, seed=7, batch_size=3)
    assert len({len(answer.tokens) for answer in whole.values()}) > 2
    for batch_size in (1, 2, 100):
        assert answers(model, sampling, seed=7, batch_size=batch_size) == whole
    some = dict(reversed(list(enumerate(PROMPTS))[2:5]))
    assert answers(model, sampling, some, seed=7) == {row: whole[row] for row in some}
    assert answers(model, sampling, seed=8) != whole
    same_prompt = answers(model, sampling, [PROMPTS[0]] * 2, seed=7)
    assert same_prompt[0].tokens == whole[0].tokens != same_prompt[1].tokens


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_prompts_read_in_pieces_give_what_each_gives_alone(version):
    model = random_model(version, torch.float64)
    alone = [model(torch.tensor(list(prompt))) for prompt in PROMPTS]
    for budget in (5, 17, 64, 10**6):
        hidden, state = prefill(model, PROMPTS, budget)
        torch.testing.assert_close(hidden, torch.stack([h[-1] for h, _ in alone]), rtol=1e-9, atol=1e-9)
        expected = State.cat([state for _, state in alone])
        for part in ("att_shift", "wkv", "ffn_shift"):
            torch.testing.assert_close(getattr(state, part), getattr(expected, part), rtol=1e-9, atol=1e-9)


def test_the_batch_stays_full_while_prompts_wait():
    drawn, waiting = [], 40

    def prompts():
        nonlocal waiting
        for row in range(40):
            waiting -= 1
            yield row, list(b"x")

    def on_tokens(count):
        if waiting:
            assert count == 5
        drawn.append(count)

    found = list(generate(fixed_model(logits_of(a=2.0, newline=2.0)), BYTES, prompts(), Sampling(top_p=1.0), 0, 5, on_tokens))
    assert sorted(answer.row for answer in found) == list(range(40))
    assert sum(drawn) == sum(len(answer.tokens) for answer in found)
    assert len({len(answer.tokens) for answer in found}) > 3


def test_a_blank_line_ends_an_answer_across_tokens():
    model = fixed_model(logits_of(a=2.0, newline=1.5))
    for answer in answers(model, Sampling(top_p=1.0, frequency=0), [b"x"] * 30).values():
        written = bytes(answer.tokens).decode()
        assert answer.reason == "stop" and written.endswith("\n\n") and "\n\n" not in written.lstrip("\n")[:-2]
        assert answer.text == written.strip() != ""


def test_a_stop_of_ones_own_and_none_at_all():
    model = fixed_model(logits_of(a=2.0, b=2.0, newline=1.0))
    for answer in answers(model, Sampling(top_p=1.0, frequency=0, stop="abab"), [b"x"] * 10).values():
        assert answer.reason == "stop" and bytes(answer.tokens).decode().removesuffix("abab").strip().replace("\n\n", "\n")
        assert "abab" not in answer.text
    endless = answers(model, Sampling(top_p=1.0, frequency=0, stop="", max_tokens=200), [b"x"])[0]
    assert endless.reason == "max_tokens" and len(endless.tokens) == 200 and b"\n\n" in bytes(endless.tokens)


def test_an_answer_is_never_empty():
    """Blanks are by far the likeliest here; whatever would end the row blank is drawn anew, up to the last token."""
    model = fixed_model(logits_of(newline=9.0, space=5.0, a=0.0))
    greedy = answers(model, Sampling(temperature=0, frequency=0, max_tokens=7), [b"x"])[0]
    assert bytes(greedy.tokens) == b"\n \n \n a" and greedy.text == "a" and greedy.reason == "max_tokens"
    for sampling in (Sampling(max_tokens=30), Sampling(max_tokens=1), Sampling(top_p=1.0, max_tokens=5)):
        assert {answer.text for answer in answers(model, sampling, [b"x"] * 10).values()} == {"a"}
    # Half a character is no text either: it waits for the rest, which no token is left for.
    half = fixed_model(logits_of(é=9.0, a=0.0))
    assert answers(half, Sampling(max_tokens=1), [b"x"])[0].text == "a"


def test_the_end_of_text_is_never_drawn_unless_allowed():
    model = fixed_model(logits_of(end=9.0, a=3.0, b=3.0))
    for answer in answers(model, Sampling(top_p=1.0, max_tokens=40), [b"x"] * 5).values():
        assert 0 not in answer.tokens and answer.reason == "max_tokens"
    allowed = answers(model, Sampling(top_p=1.0, max_tokens=40, ban_end_of_text=False), [b"x"] * 5)
    assert {answer.reason for answer in allowed.values()} == {"end_of_text"}
    assert all(answer.tokens[-1] == 0 and answer.text for answer in allowed.values())


def test_logits_that_are_not_finite_are_told_with_the_row():
    model = random_model("x070")
    model.emb.weight[ord("q")] = torch.nan
    with pytest.raises(UserError, match="row 2, token 1 of its answer are not finite"):
        answers(model, Sampling(), [b"a", b"q"])
