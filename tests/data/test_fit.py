"""Rows that a template can't render are faults, found before anything is made; answers that it changes are counted."""

import re
import time
from pathlib import Path

import pytest

from src.data.conversation import ASSISTANT, HUMAN, Turn
from src.data.examples import Example
from src.data.faults import Fault, Reading, refusal
from src.data.fit import fitted, has_turn_inside
from src.data.load_template import load_template
from src.data.rows import Row
from src.data.templates import CLASSIC, TEMPLATES
from src.errors import UserError
from src.tokenizer import load_tokenizer

ROWS = [Row("q", "<think>a</think>b", "<think>c</think>d"), Row("q", "a", "<think>b</think>c"),
        Row("q", "<think>a</think>b", "c"), Row("q", "<think>a</think>b", "")]


def reading(rows: list) -> Reading:
    return Reading(Path("x.csv"), rows, list(range(2, 2 + len(rows))), [Fault(1, "empty prompt", "x.csv: row 1 ...")], ["a note"])


def test_rows_that_can_not_be_rendered_are_faults_with_their_numbers():
    found = fitted(reading(ROWS), TEMPLATES["g1-think"])
    assert found.rows == [ROWS[0], ROWS[3]] and found.numbers == [2, 5]
    assert [(fault.row, fault.kind) for fault in found.faults] == [
        (1, "empty prompt"), (3, "answer without thinking"), (4, "answer without thinking")]
    assert found.faults[1].message.startswith("x.csv: row 3: its chosen does not begin with <think,")
    assert found.faults[2].message.startswith("x.csv: row 4: its reject does not begin with <think,")
    assert fitted(reading(ROWS), TEMPLATES["g1"]) == reading(ROWS)


def test_answers_that_are_nothing_but_thinking_are_faults_where_thinking_has_no_loss():
    rows = [Row("q", "<think>a</think>b", "c"), Row("q", "<think>a", "c"), Row("q", "c", "<think>a</think>")]
    found = fitted(reading(rows), TEMPLATES["g1"], "answer")
    assert found.rows == rows[:1] and [fault.kind for fault in found.faults[1:]] == ["unfinished thinking", "only thinking"]
    talk = Example([Turn(HUMAN, "q"), Turn(ASSISTANT, "<think>", trained=False), Turn(HUMAN, "q"), Turn(ASSISTANT, "a")], 0)
    assert fitted(reading([talk, "a text"]), TEMPLATES["g1"], "answer").rows == [talk, "a text"]


@pytest.mark.parametrize(("name", "loss_on", "words"), [
    ("g1-think", "all", "its answer 3 does not begin with <think,"), ("g1-think:think", "all", "its answer 3 does not begin"),
    ("g1-fakethink", "all", "its answer 2 begins with <think>,"), ("g1", "answer", "its answer 2 has nothing after </think>,"),
])
def test_which_answer_of_a_conversation_is_at_fault(name, loss_on, words):
    """The first one is no fault under g1-fakethink, where it is only read: it has no loss."""
    answers = [Turn(ASSISTANT, "<think>a</think>b", trained=False), Turn(ASSISTANT, "<think>a</think>"), Turn(ASSISTANT, "b")]
    turns = [turn for answer in answers for turn in (Turn(HUMAN, "q"), answer)]
    [_, fault] = fitted(reading([Example(turns, 0)]), TEMPLATES[name], loss_on).faults
    assert fault.message.startswith(f"x.csv: row 2: {words}")
    # Of a single one it is plain which, and so it is where only the last is trained.
    for example in (Example(turns[2:4], 0), Example(turns[4:], 0), Example(turns, 5), Example(turns[:4], 3)):
        for fault in fitted(reading([example]), TEMPLATES[name], loss_on).faults[1:]:
            assert re.match(r"x\.csv: row 2: its answer [a-z]", fault.message)


def test_a_list_with_an_answer_that_can_not_be_rendered_is_left_out_once():
    rows = [Row("q", "<think>a</think>b", "c"), Row("q", "<think>a</think>b", "<think>d"), Row("q", "<think>e", "<think>d"),
            Row("r", "<think>a</think>b", "<think>d")]
    of_lists = Reading(Path("x.jsonl"), rows, [1, 1, 1, 2], [], [], facts={"lists": {"count": 2, "pairs": 4, "rule": "all"}})
    found = fitted(of_lists, TEMPLATES["g1-think"])
    assert found.rows == rows[3:] and found.numbers == [2] and [fault.row for fault in found.faults] == [1]
    assert found.facts == {"lists": {"count": 1, "pairs": 1, "rule": "all"}}
    assert refusal(found).startswith("x.jsonl: row 1: its reject does not begin with <think,")


@pytest.mark.parametrize(("source", "words"), [
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
     "is rendered 0 times by --template {}, where it must be exactly once; correct the template"),
    ("{{ raise_exception('no') }}",
     "can't be rendered by --template {}: the template refuses it: no; correct the template, or the row"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}ab{% endfor %}{% endfor %}", "can't be rendered by --template {}: "),
])
def test_a_template_that_can_render_no_row_is_refused_with_the_first(tmp_path, source, words):
    """Without trying the others, which may take as long."""
    path = tmp_path / "a.jinja"
    path.write_text(source)
    broken = load_template(str(path), load_tokenizer("bytes"))
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        fitted(reading([Row("q", "a", "b")] * 100_000), broken)
    assert str(caught.value).startswith(f"x.csv: row 2: its chosen {words.format(path)}") and time.process_time() - started < 1
    assert fitted(reading(["a text"]), broken) == reading(["a text"])


def test_changed_answers_are_counted_once_a_file():
    rows = [Row("a\n\nb", "a\n\nb", "c"), Row("q", " a\r\nb ", "a\n \nb"), Row("q", "a\nb", "")]
    assert fitted(reading(rows), CLASSIC).notes[1:] == [
        "2 of 5 answers lose their blank lines, since --template classic ends a turn at one; --template g1 keeps them"]
    assert fitted(reading(rows), TEMPLATES["g1"]).notes == ["a note"]


def test_answers_with_a_turn_inside():
    g1 = TEMPLATES["g1"]
    inside = [Row("q", "a\n\nUser: b", "c"), Row("q", "a", "b\n\nSystem: c"), Row("q", "a\n\nAssistant:b", "c")]
    outside = [Row("q\n\nUser: x", "a\nUser: b", "c"), Row("q", "a User: b", "User: c"), Row("q", "a\n\nQuestion: b", "c")]
    assert [has_turn_inside(row, g1) for row in (*inside, *outside)] == [True] * 3 + [False] * 3
    assert has_turn_inside(Row("q", "a\n\nQuestion: b", "c"), CLASSIC) and has_turn_inside(Row("q", "a\nUser: b", "c"), CLASSIC)
