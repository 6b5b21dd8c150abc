"""The likeliest answers beside a loop that reads the whole text for each byte, and that asking for them leaves no trace."""

import pytest
import torch

from src.adapters.state import add_state
from src.checkpoint.base import load_base
from src.data.templates import CLASSIC
from src.generation.greedy import likeliest_answers
from src.model import build_model
from src.tokenizer.byte import ByteTokenizer
from tests.tiny import COLOURS

PROMPTS = [list(f"\0User: What colour is {thing}?\n\nAssistant:".encode()) for thing in COLOURS]


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_answers_take_the_likeliest_byte_each_time_and_come_in_the_prompts_order(tiny_checkpoints, version, tuned):
    """By a base model, and by one with trained initial states; in float64, where no two bytes are within rounding."""
    model = build_model(*load_base(tiny_checkpoints(version, "trained", 16)), torch.float64)
    if tuned:
        plain = likeliest_answers(model, ByteTokenizer(), PROMPTS, 40, CLASSIC.ending)
        generator = torch.Generator().manual_seed(0)
        for block in model.blocks:
            add_state(block)
            block.att.time_state.data.normal_(generator=generator)
    written = likeliest_answers(model, ByteTokenizer(), PROMPTS, 40, CLASSIC.ending)
    for prompt, (text, complete) in zip(PROMPTS, written, strict=True):
        answer = b""
        while b"\n\n" not in answer and len(answer) < 40:  # the whole text read anew for each byte
            hidden, _ = model(torch.tensor([*prompt, *answer]))
            answer += bytes([1 + int(model.logits(hidden[-1])[1:].argmax())])
        assert text == answer.decode(errors="replace").partition("\n\n")[0].strip()
        assert complete == (b"\n\n" in answer)
    assert written != plain if tuned else any(complete for _, complete in written) and len(set(written)) > 1


def test_an_answer_that_is_cut_off_says_so_and_an_empty_prompt_has_one(tiny_checkpoints):
    model = build_model(*load_base(tiny_checkpoints("x060", "trained", 16)))
    (text, complete), (begun, _) = likeliest_answers(model, ByteTokenizer(), [PROMPTS[0], []], 4, CLASSIC.ending)
    assert not complete and len(text) <= 4 and begun


def test_training_goes_on_as_if_it_had_not_been_asked(tiny_checkpoints):
    model = build_model(*load_base(tiny_checkpoints("x070", "trained", 16))).train()
    random = torch.get_rng_state()
    likeliest_answers(model, ByteTokenizer(), PROMPTS[:1], 4, CLASSIC.ending)
    assert model.training and torch.equal(torch.get_rng_state(), random)
