"""Chat templates of files as templates: what becomes prompt, answer and control token, by hand."""


import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn
from src.data.faults import BadRow
from src.data.load_template import load_template
from src.data.rows import Row
from src.data.shown_pair import pair_as_read
from src.data.templates import Ending, Piece, answer_pieces
from src.data.tokenize import tokenize_pairs
from src.errors import UserError
from src.generation.vocabulary import answer_text
from src.tokenizer import load_tokenizer
from src.tokenizer.base import END_OF_TEXT
from tests.data.chat_templates import QWEN_3
from tests.tokenizer.files import byte_level

WORLD = load_tokenizer("world")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# In the style of RWKV's conversions, with a word for the end of a text, and turns that end at a blank line.
RWKV = ("{{ bos_token }}{% for m in messages %}{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[m.role] }}: "
        "{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
# Ends answers with the end-of-text token, opens thinking where an answer begins.
THINKING = ("{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}"
            "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: <think>{% endif %}")
TURNS = [Turn(SYSTEM, "Be\n\nkind."), Turn(HUMAN, " Why? ")]


def test_chatml_on_a_vocabulary_without_its_words(template):
    made = template(CHATML)
    prompt = "<|im_start|>system\nBe\n\nkind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert made.prompt(TURNS) == [Piece(prompt, False)]
    assert made.conversation([*TURNS, Turn(ASSISTANT, "So.\n\nYes.")], 2) == [
        Piece(prompt, False), Piece("So.\n\nYes.<|im_end|>\n", True)]
    assert made.ending == Ending(("<|im_end|>",), ()) and not made.begins_with_end_of_text
    assert made.turn_marks == ("<|im_end|>", "<|im_start|>user", "<|im_start|>assistant", "<|im_start|>system")


@pytest.mark.parametrize("special", [{}, {"bos_token": "<|rwkv_tokenizer_end_of_text|>", "eos_token": "\n\n"},
                                     {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}])
def test_token_0_under_its_names_and_turns_that_end_at_a_blank_line(template, special):
    made = template(RWKV, **special)
    assert made.prompt(TURNS[1:]) == [Piece(END_OF_TEXT, False, is_control=True), Piece("User: Why?\n\nAssistant:", False)]
    assert made.begins_with_end_of_text and made.ending == Ending(("\n\n",), (), collapses=True)
    assert made.conversation([*TURNS[1:], Turn(ASSISTANT, "So.")], 1)[2:] == [Piece(" So.\n\n", True)]


def test_answers_collapse_where_turns_end_at_a_blank_line(template):
    made = template(RWKV)
    turns = [*TURNS[1:], Turn(ASSISTANT, "So.\n\nYes."), Turn(HUMAN, "a\n\nb"), Turn(ASSISTANT, "c\n \nd")]
    assert [piece.text for piece in made.conversation(turns, 0) if piece.is_answer] == [" So.\nYes.\n\n", " c\nd\n\n"]
    assert made.prompt(turns[:-1])[-1].text == "User: Why?\n\nAssistant: So.\nYes.\n\nUser: a\n\nb\n\nAssistant:"


def test_an_end_by_text_before_an_end_by_token(template):
    """Phi-3's template: a word ends each turn, the end-of-text token the whole."""
    made = template("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
                    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
    assert made.ending == Ending(("<|end|>",), (END_OF_TEXT,))


def test_thinking_that_a_template_adds_or_leaves(template):
    """Qwen 3's template opens an answer with an empty thinking part, unless it has one."""
    made = template(QWEN_3)
    thinking = "<think>\nHm.\n\nWell.\n</think>\n\nYes."
    for answer, text in ((thinking, thinking), ("<think>\n\n</think>\n\nYes.", "<think>\n\n</think>\n\nYes."),
                         ("Yes.", "<think>\n\n</think>\n\nYes.")):
        assert made.conversation([*TURNS[1:], Turn(ASSISTANT, answer)], 1)[1:] == [Piece(f"{text}<|im_end|>\n", True)]
    with pytest.raises(BadRow, match=r"it becomes '<think>\\nHm\.\\n</think>\\n\\nYes\.'"):
        made.conversation([*TURNS[1:], Turn(ASSISTANT, "<think>Hm.</think>Yes.")], 1)
    [pair], _ = tokenize_pairs([Row("Why?", "Yes.", thinking)], WORLD, None, 1000, 0, template=made, loss_on="answer")
    assert {WORLD.decode(tokens[start:]) for tokens, start in zip(pair[1:3], pair[3:5], strict=True)} == {"\n\nYes.<|im_end|>\n"}


def test_what_a_cut_prompt_keeps_is_what_is_shown(template, tmp_path):
    """Only the end-of-text token stays at the beginning of a cut prompt, not any control token."""
    path = str(tmp_path / "tokenizer.json")
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(path)
    words = load_tokenizer(path)
    for source, kept in ((CHATML, False), ("{{ bos_token }}" + CHATML, True)):
        made = template(source, words)
        [whole], _ = tokenize_pairs([Row("Why?", "So.", "No.")], words, None, 1000, 0, template=made)
        length = len(whole.prompt) + len(whole.chosen)
        [pair], _ = tokenize_pairs([Row("Why?", "So.", "No.")], words, None, length - 3, 0, template=made)
        assert pair.prompt == (whole.prompt[:1] + whole.prompt[4:] if kept else whole.prompt[3:])
        shown = pair_as_read(whole, words, length - 3, made.begins_with_end_of_text)["prompt"]
        assert len(shown) == len(pair.prompt) and (shown[0] == "<|endoftext|>") is kept


def test_an_opening_and_an_end_by_token(template):
    made = template(THINKING)
    assert made.ending == Ending((), (END_OF_TEXT,), "<think>")
    assert made.conversation([*TURNS[1:], Turn(ASSISTANT, "<think>Hm.</think>\n\nYes.")], 1) == [
        Piece("U: Why?\nA: <think>", False), Piece("Hm.</think>\n\nYes.", True), Piece(END_OF_TEXT, True, is_control=True)]
    assert made.ending.answer("Hm.</think>\n\nYes.") == "<think>Hm.</think>\n\nYes."
    with pytest.raises(BadRow, match="does not follow the prompt"):
        made.conversation([*TURNS[1:], Turn(ASSISTANT, "Yes.")], 1)


def test_a_text_that_ends_an_answer_is_not_longer_than_generation_can_stop_at(template):
    for length in (1000, 1001):
        source = CHATML.replace("<|im_end|>", "." * length)
        if length == 1000:
            assert template(source).ending.stops == ("." * length,)
        else:
            with pytest.raises(UserError, match="ends an answer with has 1001 bytes, of at most 1000"):
                template(source)


def test_control_words_in_texts_stay_text(template):
    made = template(RWKV.replace("\n\n", "{{ eos_token }}"))
    turns = [Turn(HUMAN, f"What is {END_OF_TEXT}?"), Turn(ASSISTANT, f"It is {END_OF_TEXT}, twice: {END_OF_TEXT}.")]
    assert made.conversation(turns, 1) == [
        Piece(END_OF_TEXT, False, is_control=True), Piece(f"User: What is {END_OF_TEXT}?", False),
        Piece(END_OF_TEXT, False, is_control=True), Piece("Assistant:", False),
        Piece(f" It is {END_OF_TEXT}, twice: {END_OF_TEXT}.", True), Piece(END_OF_TEXT, True, is_control=True)]
    [pair], _ = tokenize_pairs([Row(turns[0].text, turns[1].text, "a")], WORLD, None, 1000, 0, template=made)
    assert [tokens.count(0) for tokens in pair[:3]] == [2, 1, 1]


@pytest.mark.parametrize(("source", "words"), [
    ("{% for m in messages %}{{ m.content | replace('So', 'No') }}{{ eos_token }}{% endfor %}", "it becomes 'No <|endoftext|>.'"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
     "ends in 'Why <|endoftext|>?A:'"),
    ("{% for m in messages %}{% if 'So' in m.content %}{{ raise_exception('not ' ~ m.content) }}{% endif %}{{ m.content }}"
     "{% endfor %}", "refuses it: not So <|endoftext|>.;")])
def test_messages_show_control_words_as_in_the_data(template, source, words):
    with pytest.raises(BadRow) as caught:
        answer_pieces(template(source), "Why <|endoftext|>?", "So <|endoftext|>.")
    assert words in str(caught.value)


def test_several_answers_and_messages_of_the_same_speaker(template):
    turns = [*TURNS, Turn(ASSISTANT, "a"), Turn(HUMAN, "b"), Turn(ASSISTANT, "c", trained=False), Turn(HUMAN, "d"),
             Turn(ASSISTANT, "e")]
    pieces = template(CHATML).conversation(turns, 0)
    assert [piece.text for piece in pieces if piece.is_answer] == ["a<|im_end|>\n", "e<|im_end|>\n"]
    assert "".join(piece.text for piece in pieces).count("<|im_start|>") == 7
    assert [piece.may_train for piece in pieces] == [True, True, True, False, True, True]


@pytest.mark.parametrize(("source", "answer", "words"), [
    ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}", "<think>x</think>y", "is changed by"),
    ("{% for m in messages %}{{ m.content | upper }}|{% endfor %}", "no", "must be exactly once"),
    ("{% for m in messages %}{{ m.content }}|{% endfor %}{% if '@' in messages[-1].content %}"
     "{{ messages[-1].content }}{% endif %}", "a @", "is changed by"),
    ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}|{% endfor %}", "a", "must be exactly once"),
    ("{% for m in messages %}{% if 'q' in m.content %}{{ raise_exception('no q, please') }}{% endif %}{{ m.content }}|"
     "{% endfor %}", "q", "no q, please"),
    ("{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}", "a",
     "does not follow the prompt"),
    ("{% for m in messages %}{% if '@' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
     "{% endfor %}{% endif %}{{ m.content }}|{% endfor %}", "@", "takes over"),
])
def test_a_template_that_does_not_give_every_answer_exactly_once(template, source, answer, words):
    with pytest.raises(UserError, match=words):
        answer_pieces(template(source), "Why?", answer)


def test_turns_that_change_later(template):
    made = template("{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}"
                    "{% endif %}|{% endfor %}")
    turns = [Turn(HUMAN, "a"), Turn(ASSISTANT, "b"), Turn(HUMAN, "c"), Turn(ASSISTANT, "d")]
    assert made.conversation(turns, 3)
    with pytest.raises(BadRow, match="renders otherwise once further turns follow"):
        made.conversation(turns, 1)


def test_a_control_token_that_the_tokenizer_lacks(template, tmp_path):
    from tests.tokenizer.files import KINDS, saved
    tokenizer = load_tokenizer(saved(KINDS["ByteLevel"](), tmp_path))
    with pytest.raises(UserError, match="its bos_token is '<s>', which --tokenizer .* does not have"):
        template(RWKV, tokenizer, bos_token="<s>", eos_token="<|endoftext|>")


@pytest.mark.parametrize(("tokenizer", "words"), [
    ("bytes", "note: --template {path}: <|rwkv_tokenizer_end_of_text|> is plain text with --tokenizer bytes, which has no such "
              "token; write {{{{ eos_token }}}} in its place for the end of text\n"), ("world", "")])
def test_rwkvs_end_of_text_on_a_tokenizer_without_it(template, capsys, tokenizer, words):
    source = CHATML.replace("<|im_end|>", "<|rwkv_tokenizer_end_of_text|>")
    made = template(source, load_tokenizer(tokenizer))
    assert capsys.readouterr().err == words.format(path=made.name)
    assert made.ending.controls == (() if words else (END_OF_TEXT,))
    # Named as a special token, or written by its name, it is the tokenizer's own.
    for same, named in ((CHATML.replace("<|im_end|>", "{{ eos_token }}"), {}),
                        (source, {"eos_token": "<|rwkv_tokenizer_end_of_text|>"})):
        assert template(same, load_tokenizer(tokenizer), **named).ending.controls == (END_OF_TEXT,)
    assert capsys.readouterr().err == ""


def test_the_fingerprint_is_that_of_source_and_special_tokens(template):
    prints = {template(source, **special).fingerprint for source in (CHATML, RWKV)
              for special in ({}, {"bos_token": "<s>"}, {"bos_token": "<s>", "eos_token": "</s>"})}
    assert len(prints) == 6


@settings(max_examples=30)
@given(st.lists(st.text(st.one_of(st.sampled_from(" \n\t<|>:{}%"),
                                  st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=30)
                .filter(str.strip), min_size=2, max_size=2))
def test_answers_come_back_from_their_tokens(tmp_path_factory, answers):
    path = tmp_path_factory.getbasetemp() / "chatml.jinja"
    path.write_text(CHATML)
    made = load_template(str(path), WORLD)
    [pair], _ = tokenize_pairs([Row("Why?", *answers)], WORLD, None, 10**6, 0, template=made)
    for text, tokens in zip(answers, pair[1:3], strict=True):
        assert answer_text(WORLD, tokens, made.ending) == text.replace("\r\n", "\n").strip()
