"""Messages in every form that the field has of them: as objects, in parts, with weights, and as the text that a CSV holds."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn
from src.data.faults import BadRow
from src.data.messages import as_flag, message_turns, messages_in
from src.data.printed import parse

pytestmark = pytest.mark.usefixtures("storage")

USER, REPLY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
TURNS = [Turn(HUMAN, "Why?"), Turn(ASSISTANT, "So.")]
any_character = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(st.one_of(st.sampled_from("""'"\\\n{}[] ,()"""), any_character), max_size=12)
messages = st.fixed_dictionaries({"content": texts, "role": st.sampled_from(["user", "assistant"])})
lists = st.lists(messages, min_size=1, max_size=3)


def in_a_csv(cell) -> str:
    """What pandas writes of a cell, read back by pandas."""
    buffer = io.StringIO()
    pd.DataFrame({"x": [cell]}).to_csv(buffer, index=False)
    return pd.read_csv(io.StringIO(buffer.getvalue()), dtype=str, keep_default_na=False)["x"][0]


@given(lists)
def test_a_list_written_as_text_is_the_list(messages):
    array = np.empty(len(messages), dtype=object)
    array[:] = messages
    for text in (json.dumps(messages), json.dumps(messages, ensure_ascii=False, indent=1), in_a_csv(messages), in_a_csv(array),
                 str(array), repr(array), f"  {messages!r}\n"):
        assert messages_in(text, "row 1: its chosen") == messages, text
    assert messages_in(json.dumps(messages[0]), "x") == messages_in(str(messages[0]), "x") == messages[:1]


@pytest.mark.parametrize("role, content", [("role", "content"), ("from", "value")])
def test_an_object_of_lists_is_a_list_of_objects(role, content):
    cell = {role: ["user", "assistant"], content: ["Why?", "So."]}
    arrays = {key: np.array(entries, dtype=object) for key, entries in cell.items()}
    for value in (cell, json.dumps(cell), in_a_csv(cell), in_a_csv(arrays)):
        assert message_turns(messages_in(value, "x"), "x") == TURNS, value
    with pytest.raises(BadRow):  # of different lengths
        message_turns(messages_in(cell | {role: ["user"]}, "x"), "x")


def test_arrays_within_messages():
    parts = np.array([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], dtype=object)
    text = str(np.array([{"role": "user", "content": parts}, REPLY], dtype=object))
    assert "array(" in text
    assert message_turns(messages_in(text, "x"), "x") == [Turn(HUMAN, "a\nb"), Turn(ASSISTANT, "So.")]


@pytest.mark.parametrize("text", [
    "plain", "", "[]", "{}", "[1, 2]", '[{"name": "x"}]', '{"role": "engineer", "content": "builds"}', '{"from": "a", "to": "b"}',
    '{"role": "user"}', "[{'a': 1} {'b': 2}]", 'const chat = [{"role": "user", "content": x}]', '[{role: "user", content: "x"}]',
    "[" * 5000, "{" * 5000, '{"role": "user"}, and {"content": "x"}' + " more",
])
def test_texts_that_are_no_messages_stay_texts(text):
    try:
        assert messages_in(text, "row 1: its chosen") is None
    except BadRow as fault:  # what begins like a list of messages may be refused, but is never read as something else
        assert '"role": "user"' in text and str(fault).startswith("row 1: its chosen begins like a list of messages")


@pytest.mark.parametrize("text", ["[{'content': 'What is 2+2?', 'role': 'user'} ...]", "[{'role': 'user', 'content': 'cut o",
                                  "[{'content': 'a', 'role': 'user'}\n ...\n {'content': 'b', 'role': 'user'}]",
                                  '[{"role": "user", "content": "a"}, {"role": "assistant", "content": ' + "[" * 3000])
def test_a_list_that_is_cut_or_too_deep_is_refused(text):
    with pytest.raises(BadRow, match="^row 7: its chosen begins like a list of messages written as text, but can't be read"):
        messages_in(text, "row 7: its chosen")


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": [{"type": "text", "text": "So."}]}, {"role": "assistant", "content": [{"text": "So."}]},
    {"role": "assistant", "content": ["So."]}, {"from": "gpt", "value": "So."}, {"role": "Assistant", "content": "So."},
    {"from": "assistant", "content": "So."}, {"role": "model", "value": "So."}, {"role": None, "from": "bot", "value": "So."},
])
def test_one_message_in_every_form(message):
    assert message_turns(messages_in(message, "x"), "x") == [Turn(ASSISTANT, "So.")]
    assert message_turns([USER, message], "x") == TURNS


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "loss"])
@pytest.mark.parametrize(("value", "trained"), [(0, False), (0.0, False), (False, False), ("0", False), ("False", False),
                                                (1, True), (1.0, True), (True, True), (None, True), (math.nan, True)])
def test_weights(key, value, trained):
    assert message_turns([USER, REPLY | {key: value}], "x") == [TURNS[0], TURNS[1]._replace(trained=trained)]
    unused = set()
    message_turns([USER | {key: value}, REPLY], "x", unused)
    assert unused == ({key} if value in (1, "1") else set())  # the user's messages have no loss anyway


def test_keys_without_effect_are_collected():
    unused = set()
    message_turns([USER | {"name": "Ann", "tool_calls": None}, REPLY | {"reasoning_content": "hm", "weight": 0}], "x", unused)
    assert unused == {"name", "reasoning_content"}


@pytest.mark.parametrize(("messages", "kind", "words"), [
    ([USER, REPLY | {"weight": 0.5}], "unsupported weight", "message 2, has weight 0.5; supported are 0 and 1"),
    ([USER, REPLY, REPLY | {"weight": 0}], "mixed weights", "message 3, has another weight"),
    ([USER, {"role": "assistant", "content": ""}], "empty answer", "message 2, has an empty answer"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [1]}], "empty answer", "calls of tools are not supported"),
    ([USER, {"role": "assistant", "content": " "}, USER, REPLY], "empty message", "message 2, has no text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "no text", "a part of type 'image_url'"),
    ([{"role": "user", "content": {"a": 1}}], "no text", "has a content of type dict"),
    ([{"role": "tool", "content": "x"}], "unsupported role", "the role 'tool'"),
    ([{"role": "user", "content": "a\0"}], "NUL character", "a NUL character; remove it"),
    ([{"role": "user", "content": "\ud800"}], "not UTF-8",
     "half of a character (a lone surrogate); write the whole character, or remove it"),
])
def test_faults_have_a_kind_and_name_the_message(messages, kind, words):
    with pytest.raises(BadRow) as caught:
        message_turns(messages, "row 3: its prompt")
    assert caught.value.kind == kind and str(caught.value).startswith("row 3: its prompt, message") and words in str(caught.value)


def test_flags():
    assert [as_flag(value) for value in (True, 1, 1.0, "true", " 1 ", "TRUE")] == [True] * 6
    assert [as_flag(value) for value in (False, 0, 0.0, "false", "0.0")] == [False] * 5
    assert [as_flag(value) for value in (None, 2, 0.5, "yes", "", [], {}, float("nan"))] == [None] * 8


@given(st.text(st.sampled_from("[]{}()'\"\\, \n\tab1:.#"), max_size=30))
def test_any_text_is_parsed_or_not(text):
    parse(text)
    parse("[{'role': 'user', " + text)


def test_the_system_message_of_a_list():
    assert message_turns([{"role": "system", "content": "s"}, USER, REPLY], "x") == [Turn(SYSTEM, "s"), *TURNS]


@pytest.mark.parametrize("key", ["1", "None", "5.5", "(1, 2)", "b'a'", "...", "True"])
def test_keys_are_texts(key):
    """Of the message itself, and at any depth in it."""
    for more in (f"{key}: 2", f"'more': {{{key}: 2}}", f"'more': [[{{'a': {{{key}: 2}}}}]]"):
        with pytest.raises(BadRow, match="can't be read as one"):
            messages_in(f"[{{'role': 'user', 'content': 'x', {more}}}]", "row 1")


@pytest.mark.parametrize("value", ["{'a'}", "[{1, 2}]", "{**{}}", "[*[]]", "f'a'", "1 + 2j", "not 1", "set()", "1" * 5000])
def test_what_json_has_nothing_like_is_no_message(value):
    for key in ("content", "more"):
        with pytest.raises(BadRow, match="can't be read as one"):
            messages_in(f"[{{'role': 'user', 'content': 'x', '{key}': {value}}}]", "row 1")


@pytest.mark.parametrize("value", ["b'a'", "1j", "...", "('a', 'b')", "1e999", "-1e999", "0x" + "f" * 5000, "-5", "True"])
def test_single_values_that_json_lacks_are_no_text(value):
    text = f"[{{'role': 'user', 'content': {value}}}]"
    with pytest.raises(BadRow, match="has a content of type"):
        message_turns(messages_in(text, "row 1"), "row 1")
    unused: set[str] = set()
    assert message_turns(messages_in(f"[{{'role': 'user', 'content': 'x', 'more': {value}}}]", "row 1"), "row 1", unused)
    assert unused == {"more"}


EXCHANGED = [Turn(HUMAN, "Why?"), Turn(ASSISTANT, "So."), Turn(HUMAN, "Oh?"), Turn(ASSISTANT, "Yes.")]


@pytest.mark.parametrize(("asked", "answered"), [("human", "assistant"), ("user", "assistant"), ("input", "output")])
def test_exchanges(asked, answered):
    exchanges = [{asked: "Why?", answered: "So."}, {asked: "Oh?", answered: "Yes."}]
    assert message_turns(messages_in(exchanges, "x"), "x") == EXCHANGED
    for last in ({asked: "Oh?", answered: ""}, {asked: "Oh?", answered: None}):
        assert message_turns(messages_in([exchanges[0], last], "x"), "x") == EXCHANGED[:3]
    with pytest.raises(BadRow, match="^x, message 2, has no text"):
        message_turns(messages_in([{asked: "Why?", answered: ""}, exchanges[1]], "x"), "x")
    with pytest.raises(BadRow, match="^x, message 1, has no text"):
        message_turns(messages_in([{asked: None, answered: "So."}], "x"), "x")


def test_objects_that_are_no_exchanges_stay_what_they_are():
    for values in ([{"input": "a"}], [{"output": "a"}], [{"role": "user", "content": "a", "input": "b", "output": "c"}], [5], [],
                   [{"input": "a", "output": "b"}, 5]):
        assert messages_in(values, "x") == values


def test_parts_may_have_their_text_under_value():
    content = [{"type": "text", "value": "Why?"}]
    assert message_turns([{"role": "user", "content": content}], "x") == [Turn(HUMAN, "Why?")]
