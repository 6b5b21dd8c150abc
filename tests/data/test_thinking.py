"""The thinking part of an answer: where it ends among tokens, and answers of which nothing would be left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.faults import BadRow
from src.data.rows import Row
from src.data.templates import CLASSIC, TEMPLATES, Ending
from src.data.thinking import check_thinking, has_thinking, thinking_tokens
from src.data.tokenize import tokenize_pairs
from src.tokenizer import load_tokenizer

WORLD = load_tokenizer("world")
words = st.lists(st.one_of(st.sampled_from(["\n", "\n\n", ">", "</", "think>", "<think>", "é你😀", " a"]), st.text(max_size=3)),
                 max_size=10).map("".join)


@pytest.mark.parametrize(("answer", "thinks"), [("<think>a</think>b", True), (" \n<think>", True), ("a <think>b</think>", False),
                                                ("<thinking>", False), ("", False)])
def test_an_answer_thinks_if_it_begins_so(answer, thinks):
    assert has_thinking(answer) is thinks


@given(words.filter(lambda text: "</think>" not in text), words)
def test_the_first_tokens_up_to_the_one_that_completes_the_end(thought, rest):
    answer = f"<think>{thought}</think>{rest}"
    tokens = WORLD.encode(answer)
    count = thinking_tokens(tokens, CLASSIC.ending, WORLD)
    assert b"</think>" in WORLD.decode_bytes(tokens[:count]) and b"</think>" not in WORLD.decode_bytes(tokens[:count - 1])
    assert thinking_tokens(tokens, Ending((), (), "a"), WORLD) == 0
    assert thinking_tokens(WORLD.encode(answer.removeprefix("<think")), Ending((), (), "<think"), WORLD) > 0
    # What a model writes before the answer's text is not the answer, unless that is the thinking part.
    assert thinking_tokens(WORLD.encode(f"<a>{answer}"), Ending((), (), lead="<a>"), WORLD) > 0
    assert thinking_tokens(WORLD.encode(f"<think>\n\n</think>\n\n{rest}"), Ending((), (), lead="<think>\n\n</think>"), WORLD) > 0


@pytest.mark.parametrize("name", ["g1", "g1-think"])
def test_pairs_have_their_loss_after_it(name):
    row = Row("Why?", "<think>Hm.\n\nWell.</think>\n\nYes.", "<think></think>No")
    for loss_on, expected in (("answer", ["\n\nYes.", "No"]), ("all", None)):
        [pair], _ = tokenize_pairs([row], WORLD, None, 1000, 0, template=TEMPLATES[name], loss_on=loss_on)
        if expected is None:
            assert (pair.chosen_from, pair.reject_from) == (0, 0)
        else:
            assert [WORLD.decode(pair.chosen[pair.chosen_from:]), WORLD.decode(pair.reject[pair.reject_from:])] == expected


@pytest.mark.parametrize(("answer", "words"), [
    ("<think>a", "has no </think>"), ("<think>a</think> \n", "has nothing after </think>")])
def test_an_answer_of_which_nothing_would_be_left(answer, words):
    with pytest.raises(BadRow, match=f"its chosen .*{words}"):
        check_thinking(answer, "its chosen")
    check_thinking("a <think>", "its chosen")
