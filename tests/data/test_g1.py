"""The templates of the RWKV-7 G1 models: the exact texts, and answers that come back from their tokens as they were."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn
from src.data.faults import BadRow
from src.data.rows import Row
from src.data.templates import CLASSIC, TEMPLATES, Piece, answer_pieces, prompt_pieces
from src.data.tokenize import tokenize_pairs
from src.files import WORDS
from src.generation.vocabulary import answer_text
from src.tokenizer import load_tokenizer
from src.tokenizer.base import END_OF_TEXT

WORLD = load_tokenizer("world")
ZERO = Piece(END_OF_TEXT, False, is_control=True)
TURNS = [Turn(SYSTEM, "Be\n\nkind."), Turn(HUMAN, "Why?\r\n\r\nSay. "), Turn(ASSISTANT, "So.\n\nYes."), Turn(HUMAN, "And?")]
TALK = "System: Be\nkind.\n\nUser: Why?\nSay.\n\nAssistant: So.\n\nYes.\n\nUser: And?"


@pytest.mark.parametrize(("name", "end"), [
    ("g1", "\n\nAssistant:"), ("g1-fakethink", "\n\nAssistant: <think>\n</think>"), ("g1-think", "\n\nAssistant: <think"),
    ("g1-think:think", " think\n\nAssistant: <think"), ("g1-think:think-a-bit", " think a bit\n\nAssistant: <think"),
    ("g1-think:think-a-lot", " think a lot\n\nAssistant: <think"),
])
def test_a_prompt_is_what_the_model_cards_say(name, end):
    template = TEMPLATES[name]
    assert template.prompt(TURNS) == [ZERO, Piece(TALK + end, False)]
    assert prompt_pieces(template, "Why?") == [ZERO, Piece(f"User: Why?{end}", False)]
    assert template.begins_with_end_of_text and template.ending.stops == ("\n\nUser:",)
    assert template.ending.controls == (END_OF_TEXT,) and template.forms == (name,)


@pytest.mark.parametrize(("name", "answer", "text"), [
    ("g1", "So.\n\n\nYes.", " So.\n\n\nYes."), ("g1", "<think>Hm.\n</think>\n\nYes.", " <think>Hm.\n</think>\n\nYes."),
    ("g1-fakethink", "So.\n\nYes.", "\nSo.\n\nYes."), ("g1-think", "<think>Hm.\n</think>\n\nYes.", ">Hm.\n</think>\n\nYes."),
])
def test_an_answer_continues_its_prompt_and_ends_with_token_0(name, answer, text):
    assert answer_pieces(TEMPLATES[name], "Why?", answer) == [Piece(text, True), Piece(END_OF_TEXT, True, is_control=True)]


def test_an_answer_before_another_turn_ends_where_that_begins():
    pieces = TEMPLATES["g1"].conversation([*TURNS, Turn(ASSISTANT, "Ah.\n\nOh.")], 0)
    assert pieces == [
        ZERO, Piece("System: Be\nkind.\n\nUser: Why?\nSay.\n\nAssistant:", False), Piece(" So.\n\nYes.\n\nUser:", True),
        Piece(" And?\n\nAssistant:", False), Piece(" Ah.\n\nOh.", True), Piece(END_OF_TEXT, True, is_control=True)]


@pytest.mark.parametrize(("name", "answer", "words"), [
    ("g1-think", "Yes.", "does not begin with <think"), ("g1-think", "a <think>", "does not begin with <think"),
    ("g1-fakethink", "<think>Hm.</think>Yes.", "begins with <think>"),
])
def test_an_answer_that_its_template_can_not_have(name, answer, words):
    with pytest.raises(BadRow, match=words):
        answer_pieces(TEMPLATES[name], "Why?", answer)


def test_templates_and_their_fingerprints():
    assert tuple(TEMPLATES) != () and set(TEMPLATES) == set(WORDS["template"])
    assert len({template.fingerprint for template in TEMPLATES.values()}) == len(TEMPLATES)
    assert all(name == template.name and len(template.fingerprint) == 64 for name, template in TEMPLATES.items())


CODE = "def f(x):\n    return x\n\n\n\tif  y:\r\n\t\tpass  \n\n```\n- a\n\n- b\n```\n> mail\n\n\n<think>no</think>  \n end"
words = st.sampled_from(["\n", "\n\n", "\n\n\n", "\r\n", "\t", "  ", "- a", "User", "<think>", "</think>", ":", "é你😀",
                         "def f():", "\x0b", "\u2028", "a"])
answers = st.lists(st.one_of(words, st.text(max_size=3)), min_size=1, max_size=12).map("".join).filter(str.strip)


@pytest.mark.parametrize("name", ["g1", "g1-fakethink", "g1-think"])
@given(chosen=answers, reject=answers)
@example(CODE, "a\n\nb")
def test_answers_come_back_from_their_tokens(name, chosen, reject):
    """Byte for byte, except for outer white space and the line breaks of Windows."""
    template = TEMPLATES[name]
    given = [f"<think>{text}" if name == "g1-think" else text.lstrip().removeprefix("<think") or "a" for text in (chosen, reject)]
    given = [text if text.strip() else "a" for text in given]
    [pair], _ = tokenize_pairs([Row("Why?", *given)], WORLD, None, 10**6, 0, template=template)
    for text, tokens in zip(given, pair[1:3], strict=True):
        assert tokens[-1] == 0 and 0 not in tokens[:-1]
        # No stop is in these texts: generation reads them by the same rule.
        assert answer_text(WORLD, tokens, template.ending._replace(stops=())) == text.replace("\r\n", "\n").strip()


@given(answers)
def test_classic_collapses_blank_lines_only(text):
    [pair], _ = tokenize_pairs([Row("Why?", text, "b")], WORLD, None, 10**6, 0)
    back = answer_text(WORLD, pair.chosen, CLASSIC.ending)
    assert "\n\n" not in back and back.split() == text.split()


def test_a_cut_prompt_keeps_token_0():
    row = Row("one two three four five", "yes", "no")
    [whole], _ = tokenize_pairs([row], WORLD, None, 10**6, 0, template=TEMPLATES["g1"])
    limit = len(whole.prompt) + len(whole.chosen) - 2
    [pair], counts = tokenize_pairs([row], WORLD, None, limit, 0, template=TEMPLATES["g1"])
    assert pair.prompt == [0, *whole.prompt[3:]] and counts.cut == 1 and counts.templates == {"g1": 1}
    [pair], _ = tokenize_pairs([row], WORLD, None, len(whole.chosen) + 1, 0, template=TEMPLATES["g1"])
    assert pair.prompt == [0]
    [pair], _ = tokenize_pairs([row], WORLD, None, len(whole.chosen), 0, template=TEMPLATES["g1"])
    assert pair.prompt == []
