"""Transcripts and messages: turns go in and the same turns come out, and what is no conversation stays one text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.conversation import (
    ASSISTANT,
    HUMAN,
    SYSTEM,
    Turn,
    clean,
    is_conversation,
    prompt_turns,
    write_prompt,
)
from src.data.messages import message_turns
from src.errors import UserError
from tests.classic import format_answer, format_conversation, format_prompt

# The words that structure a transcript come often, within lines and at their beginnings.
words = st.sampled_from(["Human:", "Assistant:", "System:", "User:", "\n", "\n\n", "\r\n\r\n", " ", "\n \n", "yes", "a b", "é😀"])
texts = st.lists(st.one_of(words, st.text(max_size=4)), min_size=1, max_size=8).map("".join).filter(lambda text: clean(text))


@st.composite
def conversations(draw):
    """Turns about, the human's last, a system message before them or not."""
    bodies = draw(st.lists(texts, min_size=1, max_size=5))
    speakers = [HUMAN if (len(bodies) - number) % 2 else ASSISTANT for number in range(len(bodies))]
    system = [Turn(SYSTEM, draw(texts))] if draw(st.booleans()) else []
    return [*system, *map(Turn, speakers, bodies)]


def cleaned(turns) -> list[Turn]:
    return [turn._replace(text=clean(turn.text)) for turn in turns]


@given(conversations())
def test_turns_survive_the_transcript(turns):
    text = write_prompt(turns)
    assert cleaned(prompt_turns(text)) == cleaned(turns)
    assert cleaned(prompt_turns(write_prompt(prompt_turns(text)))) == cleaned(turns)
    assert is_conversation(text) == (len(turns) > 1)


@given(conversations(), texts)
def test_prompt_and_answer_are_the_conversation(turns, answer):
    """What a prompt becomes for preferences is what the same turns become for SFT, the answer apart."""
    pieces = format_conversation([*turns, Turn(ASSISTANT, answer)], len(turns), 1)
    assert [piece[:2] for piece in pieces] == [(format_prompt(1, write_prompt(turns)), False), (format_answer(answer), True)]
    every = format_conversation([*turns, Turn(ASSISTANT, answer)], 0, 1)
    assert "".join(piece.text for piece in every) == "".join(piece.text for piece in pieces)
    assert sum(piece.is_answer for piece in every) == sum(turn.speaker == ASSISTANT for turn in turns) + 1


@given(st.text(st.one_of(st.sampled_from(" :\r\n\taHhu"), st.characters()), max_size=40))
def test_a_text_without_speakers_is_one_question_in_the_template_drawn(text):
    asked = ("User", "Question", "Input"), ("Assistant", "Answer", "Response")
    for template in range(3):
        assert format_prompt(template, text) == f"{asked[0][template]}: {clean(text)}\n\n{asked[1][template]}:"


MULTI = "User: a\nb\n\nAssistant: c\n\nUser: d\n\nAssistant:"


@pytest.mark.parametrize("text", [
    "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:",  # as HH-RLHF has it, the answer cut off
    "a\n\nb\n\nAssistant: c\n\nHuman: d",  # the first speaker unnamed and nothing after the last
    "Human:a\r\n\r\nb\r\n\r\nAssistant:c\r\n\r\n\r\nHuman:d ",
    "Human: a\n\nb\n\nAssistant:  \n\nAssistant: c\n\nHuman: d\n\nAssistant: ",  # an empty turn
])
def test_forms_of_a_transcript(text):
    assert [format_prompt(template, text) for template in range(3)] == [MULTI] * 3


@pytest.mark.parametrize(("text", "prompt"), [
    ("\n\nHuman: Why?\n\nAssistant:", "Question: Why?\n\nAnswer:"),
    ("System: Be brief.\n\nHuman: Why?", "System: Be brief.\n\nUser: Why?\n\nAssistant:"),
    ("Human: a\n\nHuman: b", "Question: a\nb\n\nAnswer:"),
    ("Continue:\n\nHuman: hi\n\nAssistant: ho", "Question: Continue:\nHuman: hi\nAssistant: ho\n\nAnswer:"),
    ("Human: hi\n\nAssistant: ho", "Question: Human: hi\nAssistant: ho\n\nAnswer:"),  # nothing is left to answer
    ("What does Human: mean?", "Question: What does Human: mean?\n\nAnswer:"),
    ("Human:", "Question: Human:\n\nAnswer:"),
])
def test_what_counts_as_a_conversation(text, prompt):
    assert format_prompt(1, text) == prompt


def test_a_megabyte_of_blank_lines_takes_no_time():
    turns = prompt_turns("Human: a" + "\n \n" * 300_000 + "b\n\nAssistant: c\n\nHuman: d" + "\n" * 300_000)
    assert cleaned(turns) == [Turn(HUMAN, "a\nb"), Turn(ASSISTANT, "c"), Turn(HUMAN, "d")]


def test_messages_of_trl_and_sharegpt():
    trl = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "user", "content": " b "},
           {"role": "assistant", "content": "c", "tool_calls": None}]
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "human", "value": "b"},
                {"from": "gpt", "value": "c"}]
    expected = [Turn(SYSTEM, "s"), Turn(HUMAN, "a\nb"), Turn(ASSISTANT, "c")]
    assert message_turns(trl, "x") == message_turns(sharegpt, "x") == expected


@pytest.mark.parametrize(("messages", "words"), [
    ([], "an empty list"), (["hi"], "message 1, is of type str"), ([{"role": "tool", "content": "x"}], "the role 'tool'"),
    ([{"content": "x"}], "the role None"),
    ([{"role": "user", "content": "x"}, {"role": "user", "content": " "}], "message 2, has no text"),
    ([{"role": "user", "content": [1]}], "a part of type 'int'"), ([{"role": ["user"], "content": "x"}], "role"),
    ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}], "message 2, is a system message after"),
])
def test_messages_that_are_none(messages, words):
    with pytest.raises(UserError, match="^row 3: its prompt") as caught:
        message_turns(messages, "row 3: its prompt")
    assert words in str(caught.value)
