"""What the columns of other tools' files mean, what is named as unused, and what is refused rather than guessed."""

import json
from pathlib import Path

import pytest

from src.errors import UserError
from tests.classic import format_prompt

pytestmark = pytest.mark.usefixtures("storage")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def reply(text: str | list, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


ANSWERS = {"chosen": "so.", "rejected": "no."}
PLAIN = "User: why?\n\nAssistant:"
BRIEF = "System: Be brief.\n\nUser: why?\n\nAssistant:"
AFTER = "User: hi\n\nAssistant: ho\n\nUser: why?\n\nAssistant:"
LIST = [user("why?"), reply("so.")], [user("why?"), reply("no.")]
IN_LISTS = {"chosen": LIST[0], "rejected": LIST[1]}


@pytest.mark.parametrize(("record", "prompt"), [
    # The prompt's own name, in every tool's words.
    ({"instruction": "why?"}, PLAIN), ({"question": "why?"}, PLAIN), ({"query": "why?"}, PLAIN), ({"Prompt": "why?"}, PLAIN),
    ({"messages": [user("why?")]}, PLAIN), ({"conversations": [{"from": "human", "value": "why?"}]}, PLAIN),
    ({"prompt": json.dumps([user("why?")])}, PLAIN), ({"prompt": str([user("why?")])}, PLAIN), ({"prompt": user("why?")}, PLAIN),
    # What belongs to it.
    ({"instruction": "Add.", "input": "1, 2"}, "User: Add.\n1, 2\n\nAssistant:"), ({"instruction": "why?", "input": ""}, PLAIN),
    ({"instruction": "", "input": "why?"}, PLAIN), ({"input": "why?"}, PLAIN), ({"system": "Be brief.", "input": "why?"}, BRIEF),
    ({"question": "Who?", "context": "Ann came."}, "User: Who?\nAnn came.\n\nAssistant:"),
    ({"prompt": "why?", "system": "Be brief."}, BRIEF), ({"prompt": "why?", "system_prompt": "Be brief."}, BRIEF),
    ({"prompt": "why?", "system": ""}, PLAIN), ({"prompt": "why?", "system": None}, PLAIN),
    ({"prompt": "why?", "system": [{"role": "system", "content": "Be brief."}]}, BRIEF),
    ({"prompt": "why?", "history": [["hi", "ho"]]}, AFTER), ({"prompt": "why?", "history": '[["hi", "ho"]]'}, AFTER),
    ({"prompt": "why?", "history": "[['hi', 'ho']]"}, AFTER), ({"prompt": "why?", "history": [user("hi"), reply("ho")]}, AFTER),
    ({"prompt": "why?", "history": "Human: hi\n\nAssistant: ho"}, AFTER),
    ({"prompt": "why?", "history": "[['hi' 'ho']]"}, AFTER),
    ({"prompt": "why?", "history": "[array(['hi', 'ho'], dtype=object)]"}, AFTER),
    ({"prompt": "why?", "history": "[list(['hi', 'ho'])]"}, AFTER),
    ({"prompt": "why?", "history": str([user("hi"), reply("ho")])}, AFTER),
    *(({"prompt": "why?", "history": empty}, PLAIN) for empty in ([], "[]", " [ ] ", [[]], "[[]]", "array([], dtype=object)")),
    # Several names, of which one is filled in, or all alike.
    ({"prompt": "why?", "instruction": None}, PLAIN), ({"prompt": None, "question": "why?"}, PLAIN),
    ({"instruction": "", "query": "why?", "history": [["hi", "ho"]]}, AFTER),
    ({"prompt": "why?", "system": "", "system_prompt": "Be brief."}, BRIEF),
    ({"prompt": "why?", "chosen_response": "", "rejected_messages": []}, PLAIN),
    # A history alone is the prompt.
    ({"history": "why?"}, PLAIN), ({"history": "Human: hi\n\nAssistant: ho\n\nHuman: why?"}, AFTER),
    ({"prompt": "why?", "context": [user("hi"), reply("ho")]}, AFTER),
    ({"history": [user("hi"), reply("ho"), user("why?")]}, AFTER),
    ({"prompt": "why?", "history": [["hi", "ho"]], "system": "Be brief."},
     "System: Be brief.\n\nUser: hi\n\nAssistant: ho\n\nUser: why?\n\nAssistant:"),
    ({"prompt": [{"role": "system", "content": "Be brief."}, user("why?")], "history": [["hi", "ho"]]},
     "System: Be brief.\n\nUser: hi\n\nAssistant: ho\n\nUser: why?\n\nAssistant:"),
    ({"prompt": [{"role": "system", "content": "Be brief."}, user("why?")], "system": "Be brief."}, BRIEF),
    # In RWKV's own form already.
    ({"prompt": "User: why?\n\nAssistant:"}, PLAIN), ({"prompt": "User: why?"}, PLAIN), ({"prompt": AFTER}, AFTER),
    ({"prompt": AFTER.removesuffix("\n\nAssistant:")}, AFTER), ({"prompt": BRIEF}, BRIEF),
    ({"prompt": "User: why?\r\n\r\nAssistant:\r\n"}, PLAIN), ({"prompt": "Question: why?\n\nAnswer:"}, PLAIN),
    ({"prompt": "Input: why?\n\nResponse:"}, PLAIN), ({"prompt": "Q: why?\n\nA:"}, PLAIN),
    ({"prompt": "Instruction: Add.\n\nInput: 1, 2\n\nResponse:"}, "User: Add.\n1, 2\n\nAssistant:"),
    ({"prompt": "Instruction: Add.\n\nInput:\n  1\n  2\n\nResponse:"}, "User: Add.\n  1\n  2\n\nAssistant:"),
    ({"prompt": "User: why?\n\nAssistant:", "system": "Be brief."}, BRIEF),
    ({"prompt": "User: why?\nAssistant:"}, PLAIN), ({"prompt": "System: Be brief.\nUser: why?\nAssistant:"}, BRIEF),
    ({"prompt": "User: hi\nAssistant: ho\nUser: why?"}, AFTER),
    ({"prompt": "User: root\nPassword: x\nWhy?"}, "User: root\nPassword: x\nWhy?\n\nAssistant:"),
    ({"prompt": "What does User: mean?"}, "User: What does User: mean?\n\nAssistant:"),
    ({"prompt": "Question: a\n\nAnswer: b\n\nQuestion: c\n\nAnswer:"},
     "User: Question: a\nAnswer: b\nQuestion: c\nAnswer:\n\nAssistant:"),
])
def test_a_prompt_is_what_its_columns_say(read, record, prompt):
    reading = read(record | ANSWERS)
    assert not reading.faults and reading.notes == []
    row, = reading.rows
    assert format_prompt(0, row.prompt) == prompt and row[1:] == ("so.", "no.")


@pytest.mark.parametrize("history", ['[["hi", "ho"], ["why?", "so"]]', "[]", [["hi", "ho"]], []])
def test_a_list_of_exchanges_is_no_prompt(read, history):
    reading = read({"history": history} | ANSWERS, {"history": "[WP] why?"} | ANSWERS)
    assert [fault.row for fault in reading.faults] == [1] and [row.prompt for row in reading.rows] == ["[WP] why?"]


def test_a_history_beside_conversations_is_not_the_prompt_of_other_rows(read):
    reading = read({"messages": LIST[0], "history": "", "label": 1}, {"messages": "An answer", "history": "words", "label": 1})
    assert [fault.row for fault in reading.faults] == [2] and len(reading.rows) == 1


@pytest.mark.parametrize(("record", "prompt"), [
    (IN_LISTS, PLAIN), (IN_LISTS | {"prompt": "why?"}, PLAIN), (IN_LISTS | {"system": "Be brief."}, BRIEF),
    ({"chosen_messages": LIST[0], "rejected_messages": LIST[1]}, PLAIN),
    ({"chosen": json.dumps(LIST[0]), "rejected": str(LIST[1]), "prompt": "why?"}, PLAIN),
    ({"prompt": "why?", "chosen": reply("so."), "rejected": reply("no.")}, PLAIN),
    ({"conversations": [{"from": "human", "value": "why?"}], "chosen": {"from": "gpt", "value": "so."},
      "rejected": {"from": "gpt", "value": "no."}}, PLAIN),
    ({"prompt": "why?", "chosen": [reply("so.")], "rejected": [reply([{"type": "text", "text": "no."}])]}, PLAIN),
    ({"messages": LIST[0], "rejected_response": "no."}, PLAIN), ({"messages": LIST[0], "rejected_messages": LIST[1]}, PLAIN),
    ({"chosen": LIST[0], "rejected": "no."}, PLAIN),
    ({"prompt": "\n\nHuman: why?\n\nAssistant:", "chosen": "\n\nHuman: why?\n\nAssistant: so.",
      "rejected": "\n\nHuman: why?\n\nAssistant: no."}, PLAIN),
    ({"prompt": "why?", "chosen": "Human: why?\n\nAssistant: so.", "rejected": "Human: why?\n\nAssistant: no."}, PLAIN),
    ({"prompt": "User: why?", "chosen": "Assistant: so.", "rejected": "Assistant: no."}, PLAIN),
    ({"chosen": "User: why?\n\nAssistant: so.", "rejected": "User: why?\n\nAssistant: no."}, PLAIN),
])
def test_answers_in_every_form(read, record, prompt):
    reading = read(record)
    assert not reading.faults
    row, = reading.rows
    assert format_prompt(0, row.prompt) == prompt and [text.strip() for text in row[1:]] == ["so.", "no."]


def test_an_answer_that_begins_with_a_name_is_text_beside_a_plain_prompt(read):
    reading = read({"prompt": "Write a dialogue.", "chosen": "Assistant: hi.", "rejected": "Assistant: ho."})
    assert reading.rows[0][1:] == ("Assistant: hi.", "Assistant: ho.")


@pytest.mark.parametrize(("record", "words"), [
    ({"prompt": "why?", **ANSWERS, "id": 5, "source": "web"}, "not used: columns id, source"),
    ({"prompt": "why?", **ANSWERS, "id": None, "score_chosen": 0.0}, "not used: column score_chosen"),
    (IN_LISTS | {"prompt": "why?", "messages": LIST[0], "score_chosen": 9.0}, "not used: columns messages, score_chosen"),
    (IN_LISTS | {"input": "of what?"}, "not used: column input"),
    ({"prompt": "why?", "question": "why?", **ANSWERS}, "not used: column question"),
    ({"prompt": "why?", "chosen": [reply("so.", reasoning_content="hm", weight=1)], "rejected": [reply("no.")]},
     "not used: key reasoning_content of messages"),
    ({"prompt": "why?", **ANSWERS, "label": 1}, "not used: column label"),
    ({"prompt": "why?", **ANSWERS, "weight": 72}, "not used: column weight"),
])
def test_what_has_no_effect_is_named(read, record, words):
    assert read(record).notes == [words]


def test_rows_that_are_not_to_be_learned_are_left_out(read):
    good = {"prompt": "why?", **ANSWERS}
    for key, value, other in (("label", False, True), ("weight", 0, 1), ("loss_weight", 0.0, 1.0), ("train", "false", "true")):
        reading = read(good | {key: other}, good | {key: value}, good)
        assert reading.numbers == [1, 3] and reading.notes == [f"left out 1 row that {key} marks as not to be learned"]
    reading = read({"prompt": "why?", "chosen": [reply("so.", weight=0)], "rejected": [reply("no.")]}, good)
    assert reading.numbers == [2] and reading.faults[0].kind == "answer without a loss"


@pytest.mark.parametrize(("record", "words"), [
    ({"prompt": "why?", "system": "Be brief.", "system_prompt": "Be long."},
     ("both system and system_prompt", "keep one of them")),
    ({"prompt": "why?", "System": "Be brief.", "system": "Be long."}, ("both System and system",)),
    ({"task_text": "Why is it?", "chosen": "It is so.", "rejected": "It is no."}, ("'task_text' could be it",)),
    ({"x": "One two three four five.", "chosen": "It is so.", "rejected": "It is no."}, ("'x' could be it", "rename it")),
    ({"x": [user("why?")], "chosen": "It is so.", "rejected": "It is no."}, ("'x' could be it",)),
])
def test_a_prompt_is_never_guessed(read, record, words):
    with pytest.raises(UserError) as caught:
        read(ANSWERS | record)
    assert all(word in str(caught.value) for word in words), caught.value


def test_each_row_may_name_its_prompt_otherwise(read):
    rows = ({"prompt": "why?", "question": None}, {"prompt": None, "question": "how?"}, {"instruction": "who?"})
    reading = read(*(ANSWERS | row for row in rows))
    assert [row.prompt for row in reading.rows] == ["why?", "how?", "who?"] and not reading.faults and not reading.notes
    # orpo-dpo-mix-40k's columns
    reading = read(IN_LISTS | {"prompt": "why?", "question": None}, IN_LISTS | {"prompt": None, "question": "why?"})
    assert reading.rows == [("why?", "so.", "no.")] * 2 and not reading.notes


def test_faulty_rows_leave_no_column_unused(read):
    assert read({"prompt": "why?", "chosen": [reply(" ")], "rejected": "no."}).notes == []


def test_ids_and_scores_are_no_prompt(read):
    reading = read({"prompt_id": "a-1", "model": "gpt 4", "score": 1.5, "chosen": "It is so.", "rejected": "It is no."})
    assert reading.rows == [("It is ", "so.", "no.")] and reading.notes == ["not used: columns prompt_id, model, score"]


@pytest.mark.parametrize(("record", "kind", "words"), [
    ({"prompt": "why?", "history": "hi"}, "history", "its history is neither"),
    ({"prompt": "why?", "history": [["hi"]]}, "history", "its history has an entry that is not a question with its answer"),
    ({"prompt": "why?", "instruction": "how?"}, "two prompts", "has both prompt and instruction; keep one of them"),
    ({"Query": "why?", "query": "how?"}, "two prompts", "has both Query and query"),
    ({"prompt": "why?", "question": "how?", **IN_LISTS}, "two prompts", "its question is not in the conversation"),
    ({"prompt": "why?", "history": [["hi", None]]}, "history", "not a question with its answer"),
    ({"prompt": "why?", "history": [["hi", ""]]}, "history", "an empty question or answer"),
    ({"prompt": "why?", "history": [user("hi")]}, "history", "its history ends in a message of the user"),
    ({"prompt": "why?", "history": 5}, "no text", "its history is of type int"),
    ({"prompt": "why?", "system": 5}, "no text", "its system is of type int"),
    ({"prompt": [{"role": "system", "content": "a"}, user("why?")], "system": "b"}, "two system messages", "keep one of them"),
    ({"prompt": "how?", "chosen": LIST[0], "rejected": LIST[1]}, "two prompts", "its prompt is not in the conversation"),
    ({"prompt": [reply("a")]}, "prompt without a question", "does not end in a message of the user"),
    ({"prompt": "", "system": "Be brief."}, "empty prompt", "has an empty prompt"),
    ({"prompt": "a", "chosen": "[{'role': 'user', 'content': 'a'} ..."}, "unreadable messages", "its chosen begins like a list"),
])
def test_what_cannot_be_understood_is_refused_by_row_and_key(read, record, kind, words):
    reading = read({"prompt": "a", "history": None, "system": None, **ANSWERS}, ANSWERS | record)
    fault, = reading.faults
    assert (fault.row, fault.kind) == (2, kind) and words in fault.message, fault
    assert fault.message.startswith(f"{Path(reading.path)}: row 2")
