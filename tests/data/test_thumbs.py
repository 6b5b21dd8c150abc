"""Single answers with a thumb, in every tool's columns: up is a row without a reject, down one without a chosen answer."""


import pytest

from src.data.rows import Row
from src.data.tokenize import tokenize_pairs
from src.errors import UserError
from src.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("storage")

USER, REPLY = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
SEVERAL = [USER, REPLY, {"role": "user", "content": "really?"}]


@pytest.mark.parametrize(("record", "prompt"), [
    ({"prompt": "why?", "completion": "so."}, "why?"), ({"prompt": [USER], "completion": [REPLY]}, "why?"),
    ({"question": "why?", "answer": "so."}, "why?"), ({"query": "why?", "response": "so."}, "why?"),
    ({"instruction": "Add.", "input": "1, 2", "output": "so."}, "Add.\n1, 2"), ({"prompt": SEVERAL, "completion": REPLY},
     "Human: why?\n\nAssistant: so.\n\nHuman: really?"),
    ({"prompt": "why?", "system": "Be brief.", "completion": "so."}, "System: Be brief.\n\nHuman: why?"),
    # The answer within its conversation, with or without the prompt beside it.
    ({"messages": [USER, REPLY]}, "why?"), ({"prompt": "why?", "messages": [USER, REPLY]}, "why?"),
    ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]}, "why?"),
    ({"completion": [USER, REPLY]}, "why?"), ({"completion": "\n\nHuman: why?\n\nAssistant: so."}, "why?"),
    ({"messages": [USER], "completion": REPLY}, "why?"),
    ({"messages": [USER, REPLY], "system": "Be brief."}, "System: Be brief.\n\nHuman: why?"),
])
def test_a_thumb_in_every_form(read, record, prompt):
    for thumb in ("label", "kto_tag"):
        for up, down in ((True, False), (1, 0), ("true", "false"), ("1", "0"), (1.0, 0.0), ("True", "FALSE")):
            reading = read(record | {thumb: up}, record | {thumb: down})
            assert not reading.faults and reading.notes == [], reading
            assert reading.rows == [Row(prompt, "so.", ""), Row(prompt, "", "so.")]
            assert reading.numbers == [1, 2] and reading.facts == {"thumbs": {"up": 1, "down": 1}}


GOOD = {"prompt": "why?", "completion": "so.", "label": True}


@pytest.mark.parametrize(("record", "kind", "words"), [
    ({"label": None}, "no thumb", "it has no label, where true or false (1 or 0) must say whether its completion is good"),
    ({"label": "maybe"}, "no thumb", "its label is 'maybe'"), ({"label": 2}, "no thumb", "its label is 2"),
    ({"label": ["true"]}, "no thumb", "its label is ['true']"), ({"label": 0.5}, "no thumb", "its label is 0.5"),
    ({"completion": " "}, "empty answer", "has an empty answer (its completion)"),
    ({"completion": None, "label": False}, "empty answer", "has an empty answer (its completion)"),
    ({"prompt": " "}, "empty prompt", "has an empty prompt"),
    ({"completion": 5}, "no text", "its completion is of type int"),
    ({"completion": [USER]}, "no answer", "does not end in the assistant's answer"),
    ({"completion": "a\0b"}, "NUL character", "its completion holds a NUL character; remove it"),
])
def test_what_is_no_thumb_names_its_row_and_key(read, record, kind, words):
    reading = read(GOOD, GOOD | record)
    fault, = reading.faults
    assert (fault.row, fault.kind) == (2, kind) and words in fault.message and "row 2" in fault.message, fault
    assert reading.rows == [Row("why?", "so.", "")] and reading.facts == {"thumbs": {"up": 1, "down": 0}}


def test_a_plain_answer_needs_a_prompt(read):
    reading = read({"completion": "so.", "label": True})
    assert reading.faults[0].kind == "no prompt" and "its completion is not a conversation" in reading.faults[0].message
    with pytest.raises(UserError, match="'task_text' could be it"):
        read({"task_text": "Why is it?", "completion": "so.", "label": True})


@pytest.mark.parametrize(("record", "words"), [
    (GOOD | {"chosen": "a", "rejected": "b"}, ("pairs (chosen, rejected)", "single answers with a thumb (completion, label)")),
    (GOOD | {"kto_tag": True}, ("both label and kto_tag",)), (GOOD | {"response": "no."}, ("both completion and response",)),
])
def test_two_forms_in_one_file_are_refused_in_a_line(read, record, words):
    for records in ([record], [GOOD, {key: value for key, value in record.items() if key not in GOOD} | {"prompt": "why?"}]):
        with pytest.raises(UserError) as caught:
            read(*records)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def test_beside_pairs_a_label_still_leaves_rows_out(read):
    pair = {"prompt": "why?", "chosen": "so.", "rejected": "no."}
    assert read(pair | {"label": True}, pair | {"label": False}).numbers == [1]
    assert read({"messages": [USER, REPLY], "rejected_response": "no.", "label": True}).rows == [Row("why?", "so.", "no.")]


def test_a_weight_of_zero_leaves_a_thumb_out(read):
    reading = read(GOOD | {"weight": 0}, GOOD | {"weight": 1}, GOOD | {"label": False, "weight": 1})
    assert reading.numbers == [2, 3] and reading.facts == {"thumbs": {"up": 1, "down": 1}}
    assert reading.notes == ["left out 1 row that weight marks as not to be learned"]


def test_other_columns_are_named(read):
    assert read(GOOD | {"score": 5, "id": "x"}).notes == ["not used: columns score, id"]


def test_where_rejects_are_written_thumbs_are_refused(read):
    with pytest.raises(UserError, match="holds single answers with a label, which need no rejected answers"):
        read(GOOD, require_reject=False)


def test_a_thumb_s_tokens_have_one_empty_answer(read):
    rows = read(GOOD, GOOD | {"label": False}).rows
    pairs, counts = tokenize_pairs(rows, load_tokenizer("bytes"), None, 100, seed=0)
    (_, up, nothing, *_), (_, none, down, *_) = pairs
    assert bytes(up) == bytes(down) == b" so.\n\n" and nothing == none == [] and counts.equal == 0
