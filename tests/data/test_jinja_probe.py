"""What is learned of a chat template: the texts of its turns, by hand, for templates in the styles of well-known models."""

import json

import pytest

from src.data import jinja_probe
from src.data.conversation import ASSISTANT, HUMAN, Turn
from src.data.faults import BadRow
from src.data.fit import has_turn_inside
from src.data.load_template import ending_of, recorded
from src.data.rendering import Renderer
from src.data.rows import Row
from src.data.templates import Ending, Piece, answer_pieces
from src.data.tokenize import tokenize_pairs
from src.generation.vocabulary import answer_text
from src.tokenizer import load_tokenizer
from src.tokenizer.base import END_OF_TEXT
from tests.data.chat_templates import GEMMA, LLAMA_2, LLAMA_3, QWEN_3
from tests.data.test_jinja_template import CHATML, RWKV, THINKING, TURNS, WORLD
from tests.tokenizer.files import byte_level

# In the styles of Zephyr, Mistral, Vicuna, Alpaca and Llama 3.1; and with bare names.
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content ~ eos_token }}\n{% endfor %}" \
         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
MISTRAL = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]" \
          "{% elif m.role == 'assistant' %} {{ m.content ~ eos_token }}" \
          "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
VICUNA = "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}USER: {{ m.content }} " \
         "{% else %}ASSISTANT: {{ m.content ~ eos_token }}{% endif %}{% endfor %}" \
         "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
ALPACA = "{% for m in messages %}### {{ 'Instruction' if m.role == 'user' else 'Response' }}:\n{{ m.content }}\n\n{% endfor %}" \
         "{% if add_generation_prompt %}### Response:\n{% endif %}"
LLAMA_3_1 = LLAMA_3.replace("{%- for", "{{- head('system') }}Cutting Knowledge Date: December 2023\n\n"
                            "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
                            "{% endif %}<|eot_id|>{%- for", 1)
NAMES = "{% for m in messages %}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}" \
        "{% if add_generation_prompt %}assistant\n{% endif %}"
# Writes what begins an answer only with the answer.
LATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"


@pytest.mark.parametrize(("source", "inside", "outside"), [
    (CHATML, ["So\n<|im_start|>user\nhi", "So <|im_end|> x", "a<|im_start|>assistant\nb", "<|im_start|>system"],
     ["So\n\nuser: hi", "<|im_start|>", "a\nb c"]),
    (LLAMA_3, ["a<|start_header_id|>user<|end_header_id|>\n\nhi", "a<|eot_id|>", "<|start_header_id|>system<|end_header_id|>"],
     ["user\n\nhi", "a\n\nb"]),
    (LLAMA_3_1, ["a<|start_header_id|>user<|end_header_id|>\n\nhi", "<|start_header_id|>system<|end_header_id|>"],
     ["December 2023"]),
    (QWEN_3, ["<|im_start|>user\nhi", "<|im_start|>assistant\n"], ["<think>\n\n</think>\n\na"]),
    (GEMMA, ["a<start_of_turn>user\nb", "a<start_of_turn>model\nb", "a<end_of_turn>"], ["<start_of_turn>", "user\nmodel"]),
    (ZEPHYR, ["a\n<|user|>\nb", "<|assistant|>", "<|system|>"], ["user\nsystem\n", "a\nb", "a</s>\nb", "a<|endoftext|>b"]),
    (MISTRAL, ["a [INST] b [/INST] c", "a [/INST] b"], ["a INST b", "a b", f"a {END_OF_TEXT} b"]),
    (LLAMA_2, ["a [INST] b", "a [/INST]", "[INST] <<SYS>>"], ["a <<SYS>>", "<s>"]),
    (VICUNA, ["a\nUSER: b", "a\nASSISTANT: b"], ["a USER: b", "a b", "a\nUSERS: b"]),
    (ALPACA, ["a\n### Instruction:\nb", "### Response:"], ["a\n\nb", "### Other:", "Response:"]),
    (RWKV, ["a\n\nUser: b", "a\nAssistant: b", "a\nSystem: b"], ["a\n\nb", "a User: b"]),
    (THINKING, ["a\nU: b", "a\nA: b"], ["a U: b", "<think>", "USA: b"]),
    (NAMES, ["a\nuser\nb", "a\nassistant\nb"], ["a\nusers b", "a user\nb"]),
    (LATE, ["a<user>b", "a</s>b", "<assistant>a", "<system>"], ["user", "<a>"]),
], ids=["ChatML", "Llama 3", "Llama 3.1", "Qwen 3", "Gemma", "Zephyr", "Mistral", "Llama 2", "Vicuna", "Alpaca", "RWKV",
        "thinking", "names", "late"])
def test_answers_with_a_turn_of_the_template_inside(template, source, inside, outside):
    made = template(source)
    assert made.fault is None
    assert [text for text in (*inside, *outside) if has_turn_inside(Row("q", "a", text), made)] == inside


def test_an_answer_can_not_have_control_tokens(template, tmp_path):
    """Of a tokenizer that has the template's words, an answer with these has plain text in their place; names alone are none."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(str(tmp_path / "tokenizer.json"))
    made = template(CHATML, words)
    assert made.ending == Ending((), ("<|im_end|>",)) and made.turn_marks == ()
    answer = "So <|im_end|>\n<|im_start|>user\nhi"
    [pair], _ = tokenize_pairs([Row("Why?", answer, "No.")], words, None, 1000, 0, template=made)
    assert [sum(tokens.count(words.control[word]) for word in ("<|im_end|>", "<|im_start|>")) for tokens in pair[1:3]] == [1, 1]
    # Words that separate texts are left out of what begins a turn.
    assert template(CHATML.replace("<|im_start|>", "{{ bos_token }}[").replace("\n{{ m.content", "]{{ m.content"), words
                    ).turn_marks[0] == "[user]"


def test_what_a_template_writes_only_with_an_answer_is_taken_off_what_a_model_writes(template, capsys):
    """Its prompt is that of `apply_chat_template`, where a model that learns it writes `<assistant>` itself."""
    made = template(LATE)
    assert capsys.readouterr().err == (
        f"note: --template {made.name} has no '<assistant>' in prompts, whatever add_generation_prompt says, so a model "
        "writes it itself: it is trained with the answers, and removed from generated ones\n")
    assert made.ending == Ending(("</s>",), (), lead="<assistant>")
    prompt, answer = [Piece("<user>Why?</s>\n", False)], [Piece("<assistant>No.</s>\n", True)]
    for written in ("<assistant>No.</s>\n<user>", " <assistant> No.</s>", "No.</s>"):
        text = answer_text(WORLD, WORLD.encode(written), made.ending)
        assert text == "No." and made.conversation([Turn(HUMAN, "Why?"), Turn(ASSISTANT, text)], 1) == prompt + answer
    assert ending_of(json.loads(json.dumps(recorded(made)))) == made.ending and "lead" not in recorded(template(CHATML))
    row = Row("Why?", "<think>a</think>Yes.", "<think>b</think>No.")
    [pair], _ = tokenize_pairs([row], WORLD, None, 1000, 0, template=made, loss_on="answer")
    with_loss = [WORLD.decode(tokens[start:]) for tokens, start in zip(pair[1:3], pair[3:5], strict=True)]
    assert with_loss == ["Yes.</s>\n", "No.</s>\n"]


def test_control_words_that_a_template_writes_only_with_an_answer(template, tmp_path):
    """gpt-oss's prompts end before the channel of the answer."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|channel|>", "<|message|>", "<|return|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = load_tokenizer(str(tmp_path / "tokenizer.json"))
    made = template("{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
                    "{{ m.content }}<|return|>{% endfor %}{% if add_generation_prompt %}assistant{% endif %}", words)
    assert made.ending == Ending((), ("<|return|>",), lead="<|channel|>final<|message|>")
    row = Row("Why?", "<think>a</think>Yes.", "No.")
    [pair], _ = tokenize_pairs([row], words, None, 1000, 0, template=made, loss_on="answer")
    assert pair.chosen[0] == words.control["<|channel|>"]
    assert answer_text(words, pair.chosen, made.ending) == row.chosen
    assert words.decode(pair.chosen[pair.chosen_from:]) == "Yes.<|return|>"


ALWAYS = CHATML.replace("\n{{ m.content", "\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content")


@pytest.mark.parametrize(("source", "lead"), [(QWEN_3, ""), (MISTRAL, ""), (LLAMA_2, ""), (ALWAYS, "<think></think>")])
def test_what_a_template_takes_for_part_of_an_answer_stays(template, source, lead):
    """Qwen 3's empty thinking part is not written twice, so an answer keeps it."""
    made = template(source)
    written = lead or "<think>\n\n</think>\n\n"
    assert made.ending.lead == lead
    text = made.ending.answer(f"{written}No.")
    assert text == ("No." if lead else f"{written}No.")
    pieces = made.conversation([Turn(HUMAN, "Why?"), Turn(ASSISTANT, text)], 1)
    assert "".join(piece.text for piece in pieces if piece.is_answer).count("<think>") == 1


@pytest.mark.parametrize(("source", "ends"), [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
     False),
    ("{% for m in messages %}{% if m.role == 'user' %}[Q]{% endif %}{{ m.content }}{% endfor %}", False),
    (CHATML, True), (RWKV, True), (THINKING, True), (MISTRAL, True), (ALPACA, True)])
def test_a_template_that_ends_no_last_answer_is_noted(template, capsys, source, ends):
    made = template(source)
    assert capsys.readouterr().err == ("" if ends else (
        f"note: --template {made.name} writes nothing that ends a conversation's last answer, so a model doesn't learn where "
        "to stop; write {{ eos_token }} after answers\n"))
    pieces = made.conversation([Turn(HUMAN, "Why?"), Turn(ASSISTANT, f"{made.ending.opening}So.")], 1)
    answer = [piece for piece in pieces if piece.is_answer]
    assert (any(piece.is_control for piece in answer) or any(stop in answer[-1].text for stop in made.ending.stops)) is ends


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("source", "times"), [
    (LOOP, 1), ("{% for m in messages %}{% if m.role == 'assistant' %}" + LOOP + "{% endif %}{% endfor %}", 2),
    ("{{ raise_exception('no way') }}", 2), ("{{ 'a' * 20 * 2 ** 20 }}", 1), ("{{ 'a' * 10 ** 10 }}", 1)])
def test_what_a_limit_stopped_is_not_tried_again(template, monkeypatch, source, times):
    """With a system message the template would take as long again."""
    rendered = []
    render = Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, *given, **more: rendered.append(1) or render(self, *given, **more))
    made = template(source)
    assert made.fault is not None and len(rendered) == times


def test_a_slow_template_is_not_rendered_in_silence(template, monkeypatch, capsys):
    monkeypatch.setattr(jinja_probe, "_SLOW", 0.0)
    made = template(CHATML)
    assert set(capsys.readouterr().err.splitlines()) == {f"note: --template {made.name} takes its time with a short conversation"}


@pytest.mark.parametrize(("source", "reason"), [
    ("{{ raise_exception('no way') }}", "the template refuses it: no way"), (LOOP, "the template takes over 2 s"),
    ("{{ 'a' * 20 * 2 ** 20 }}", "the template makes a text of over 16777216 characters of it"),
    ("{{ messages.__class__.x }}", "line 1 of the template: access to attribute '__class__' of 'list' object is unsafe."),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1 of the template: RecursionError: maximum recursion"),
    ("{{ nobody.name }}", "line 1 of the template: 'nobody' is undefined")])
def test_why_a_row_can_not_be_rendered_and_what_to_do(template, source, reason):
    made = template(source)
    with pytest.raises(BadRow) as caught:
        answer_pieces(made, "Why?", "So.")
    text = str(caught.value)
    assert text.startswith(f"can't be rendered by --template {made.name}: {reason}")
    assert text.endswith("; correct the template, or the row")


@pytest.mark.parametrize(("written", "what"), [
    (r"\ud800", "half of a character (a lone surrogate)"), (r"\0", "a NUL character")])
def test_a_template_that_writes_what_is_no_text(template, written, what):
    made = template(f"{{% for m in messages %}}{{{{ m.content ~ '{written}' }}}}{{% endfor %}}")
    with pytest.raises(BadRow) as caught:
        answer_pieces(made, "Why?", "So.")
    assert str(caught.value) == (f"gets {what} from --template {made.name}; correct the template, in which "
                                 "{{ eos_token }} is the end of text")


def test_a_prompt_of_nothing(template):
    made = template("{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}|{% endif %}{% endfor %}")
    assert made.prompt(TURNS) == [] and made.fault is None and not made.begins_with_end_of_text
