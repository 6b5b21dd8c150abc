"""Several answers of a conversation with `--sft 1`: each is trained after what its prompt will be, in one text or in one each."""

import pytest

from src.data.conversation import ASSISTANT, HUMAN, Turn
from src.data.examples import read_texts
from src.data.load_template import load_template
from src.data.templates import TEMPLATES
from src.errors import UserError
from src.tokenizer import load_tokenizer
from tests.data.chat_templates import CHATML, LLAMA_3, QWEN_3
from tests.data.test_examples import put, shown

BYTES = load_tokenizer("bytes")
# Ends a text, but not an answer, with the end-of-text token.
ENDS_TEXTS = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}" \
    "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
# Leaves earlier answers without their thinking, which it adds to none.
DROPS_THINKING = "{% for m in messages %}{{ m.role }}: " \
    "{{ m.content if loop.last else m.content.split('</think>')[-1] | trim }}|" \
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def put_talk(folder, texts: list[str], **more) -> str:
    """A file with one conversation: questions and answers in turn; `more` goes to the second answer."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    messages[3] |= more
    return str(put(folder / "talk.jsonl", [{"messages": messages}]))


BEGINS, MIDDLE = "\0User: Why?", "\n\nUser: Who?\n\nAssistant: I.\n\nUser: And?"


@pytest.mark.parametrize(("name", "answers", "expected"), [
    ("g1", ("So.", "No."), [f"{BEGINS}\n\nAssistant:[ So.\n\nUser:]{MIDDLE[7:]}\n\nAssistant:[ No.\0]"]),
    # Here a prompt has earlier answers as plain text, and asks for thinking once, where the answer is due.
    ("g1-fakethink", ("So.", "No."), [f"{BEGINS}\n\nAssistant: <think>\n</think>[\nSo.\0]",
                                      f"{BEGINS}\n\nAssistant: So.{MIDDLE}\n\nAssistant: <think>\n</think>[\nNo.\0]"]),
    ("g1-think:think", ("<think>a</think>b", "<think>c</think>d"), [
        f"{BEGINS} think\n\nAssistant: <think[>a</think>b\0]",
        f"{BEGINS}\n\nAssistant: <think>a</think>b{MIDDLE} think\n\nAssistant: <think[>c</think>d\0]"]),
])
def test_the_texts_of_a_conversation_by_hand(tmp_path, name, answers, expected):
    """An answer of weight 0 has none of its own."""
    path = put_talk(tmp_path, ["Why?", answers[0], "Who?", "I.", "And?", answers[1]], weight=0)
    texts, counts = read_texts(path, BYTES, 1000, 0, False, template=TEMPLATES[name])
    assert list(map(shown, texts)) == expected and (counts.rows, counts.cut, counts.dropped) == (1, 0, 0)


def test_an_answer_of_weight_0_has_no_loss_in_a_prompt_either(tmp_path):
    path = put_talk(tmp_path, ["Why?", "So.", "Who?", "I.", "And?", "No."], weight=0)
    texts, _ = read_texts(path, BYTES, 1000, 0, on_prompt=True, template=TEMPLATES["g1-fakethink"])
    assert list(map(shown, texts)) == [f"[{BEGINS}\n\nAssistant: <think>\n</think>\nSo.\0]",
                                       f"{BEGINS}\n\nAssistant: So.{MIDDLE}\n\nAssistant: <think>\n</think>[\nNo.\0]"]


@pytest.mark.parametrize("source", [*TEMPLATES, CHATML, LLAMA_3, QWEN_3, ENDS_TEXTS, DROPS_THINKING])
def test_every_answer_is_trained_after_its_prompt(tmp_path, source):
    (tmp_path / "chat.jinja").write_text(source)
    template = load_template(source if source in TEMPLATES else str(tmp_path / "chat.jinja"), BYTES)
    thinks = source.startswith("g1-think") or source in (QWEN_3, DROPS_THINKING)
    texts = [f"<think>\n{at}\n</think>\n\nA{at}" if thinks and at % 2 else f"A{at}" for at in range(6)]
    found, _ = read_texts(put_talk(tmp_path, texts), BYTES, 1000, 0, False, template=template)
    before = {bytes(text.tokens[:at]).decode() for text in found for at in range(1, len(text.tokens))
              if text.trained[at] and not text.trained[at - 1]}
    turns = [Turn(ASSISTANT if at % 2 else HUMAN, text) for at, text in enumerate(texts)]
    prompts = [template.prompt(turns[:at]) for at in (1, 3, 5)]
    assert before == {"".join("\0" if piece.is_control else piece.text for piece in prompt) for prompt in prompts}
    apart = source in (QWEN_3, ENDS_TEXTS, DROPS_THINKING, "g1-fakethink") or source.startswith("g1-think:")
    assert len(found) == (3 if apart else 1)


def test_a_text_too_long_is_dropped_alone(tmp_path):
    path = put_talk(tmp_path, ["Why?", "So.", "Who?", "x" * 60, "And?", "No."])
    texts, counts = read_texts(path, BYTES, 50, 0, False, template=TEMPLATES["g1-fakethink"])
    assert [shown(text)[-7:] for text in texts] == ["[\nSo.\0]", "[\nNo.\0]"] and (counts.cut, counts.dropped) == (1, 1)
    with pytest.raises(UserError, match="3 of 3 texts have an answer of over 3 tokens"):
        read_texts(path, BYTES, 3, 0, False, template=TEMPLATES["g1-fakethink"])


def test_a_chat_template_whose_earlier_turns_change_all_the_same(tmp_path):
    """For reasons that are in the data."""
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' and '@' in messages[0].content %}!{% endif %}|{% endfor %}")
    template = load_template(str(tmp_path / "chat.jinja"), BYTES)
    assert len(read_texts(put_talk(tmp_path, list("abcdef")), BYTES, 1000, 0, False, template=template)[0]) == 1
    with pytest.raises(UserError, match="row 1: its conversation has an answer that --template .* renders otherwise once"):
        read_texts(put_talk(tmp_path, list("@bcdef")), BYTES, 1000, 0, False, template=template)
