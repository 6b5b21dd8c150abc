"""What `--sft 1` trains on: which tokens have a loss, where long texts are cut, and which columns are known."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UserError
from src.preference.examples import read_texts
from src.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


def put(path: Path, content) -> Path:
    if path.suffix == ".jsonl":
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def shown(text) -> str:
    """The text with what has a loss in brackets."""
    result, inside = "", False
    for token, trained in zip(text.tokens, text.trained, strict=True):
        result += ("[" if trained else "]") if trained != inside else ""
        result, inside = result + chr(token), trained
    return result + ("]" if inside else "")


PLAIN = "User: Why?\n\nAssistant:[ So.\n\n]"
USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(("record", "text"), [
    ({"prompt": "Why?", "completion": "So."}, PLAIN), ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, PLAIN),
    ({"question": "Why?", "answer": "So."}, PLAIN), ({"instruction": "Why?", "response": "So."}, PLAIN),
    ({"instruction": "Why?", "input": "", "output": "So."}, PLAIN),
    ({"instruction": "Add.", "input": "1, 2", "output": "3"}, "User: Add.\n1, 2\n\nAssistant:[ 3\n\n]"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, PLAIN), ({"messages": [USER, ASSISTANT]}, PLAIN),
    ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, PLAIN),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, PLAIN),
    ({"prompt": "Why?", "chosen": [USER, ASSISTANT]}, PLAIN), ({"chosen": "\n\nHuman: Why?\n\nAssistant: So."}, PLAIN),
    # All answers of a conversation; of a prompt with its answer only that, whatever the prompt holds.
    ({"messages": [{"role": "system", "content": "Hm"}, USER, ASSISTANT, USER, ASSISTANT, USER]},
     "System: Hm\n\nUser: Why?\n\nAssistant:[ So.\n\n]User: Why?\n\nAssistant:[ So.\n\n]"),
    ({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
     "User: Why?\n\nAssistant: So.\n\nUser: Why?\n\nAssistant:[ So.\n\n]"),
    ({"prompt": "Human: Why?\n\nAssistant: So.\n\nHuman: Why?", "chosen": "So."},
     "User: Why?\n\nAssistant: So.\n\nUser: Why?\n\nAssistant:[ So.\n\n]"),
    ({"text": "Any text.\n\nOf two paragraphs."}, "[Any text.\n\nOf two paragraphs.\0]"),
])
def test_known_columns(folder, record, text):
    texts, report = read_texts(put(folder / "a.jsonl", [record]), BYTES, 1000, seed=0, on_prompt=False)
    assert list(map(shown, texts)) == [text]  # the first template drawn from seed 0 is User
    assert (report.rows, report.cut, report.dropped) == (1, 0, 0)
    assert report.trained == sum(texts[0].trained) - texts[0].trained[0]
    everything, _ = read_texts(folder / "a.jsonl", BYTES, 1000, seed=0, on_prompt=True)
    assert everything[0].tokens == texts[0].tokens and all(everything[0].trained)


def test_single_prompts_have_the_templates_of_preferences(folder):
    path = put(folder / "many.csv", "prompt,completion\n" + "Why?,So.\n" * 300)
    texts, _ = read_texts(path, BYTES, 1000, seed=1, on_prompt=False)
    counts = [sum(bytes(text.tokens).startswith(asker) for text in texts) for asker in (b"User", b"Question", b"Input")]
    assert sum(counts) == 300 and 200 < counts[0] < 280 and min(counts) > 10
    assert read_texts(path, BYTES, 1000, seed=1, on_prompt=False)[0] == texts != read_texts(path, BYTES, 1000, 2, False)[0]


@given(documents=st.lists(st.text(st.characters(exclude_characters="\0<\ufeff", exclude_categories=["Cs"]), min_size=1)
                          .filter(str.strip), min_size=1, max_size=4),
       max_len=st.integers(1, 9), end=st.sampled_from(["\0", "<|endoftext|>"]))
def test_every_token_of_a_document_but_the_first_is_predicted_once(folder, documents, max_len, end):
    path = put(folder / "documents.txt", end.join(documents))
    texts, report = read_texts(path, BYTES, max_len, seed=0, on_prompt=False)
    whole = [[*document.encode(), 0] for document in documents]
    assert all(2 <= len(text.tokens) <= max_len + 1 and all(text.trained) for text in texts)
    assert [token for text in texts for token in text.tokens[1:]] == [token for document in whole for token in document[1:]]
    assert report.trained == sum(len(document) - 1 for document in whole)
    assert report.cut == sum(len(document) - 1 > max_len for document in whole)
    put(folder / "documents.jsonl", [{"text": document} for document in documents])
    assert read_texts(folder / "documents.jsonl", BYTES, max_len, seed=0, on_prompt=False) == (texts, report)


def test_a_conversation_loses_its_beginning_and_an_answer_too_long_the_row(folder):
    records = [{"prompt": "Why is it so?", "completion": "So."}, {"prompt": "Why?", "completion": "x" * 40}]
    path = put(folder / "long.jsonl", records)
    texts, report = read_texts(path, BYTES, 20, seed=0, on_prompt=False)
    assert list(map(shown, texts)) == ["o?\n\nAssistant:[ So.\n\n]"[-22:]]
    assert (report.cut, report.dropped) == (1, 1)
    with pytest.raises(UserError, match="2 of 2 rows have an answer of over 5 tokens; raise --ctx_len"):
        read_texts(path, BYTES, 5, seed=0, on_prompt=False)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", [{"prompt": "a", "label": "b"}], ("lacks what to train on", "prompt, label", "messages, or text")),
    ("a.jsonl", [{"text": "a"}, {"text": " "}], ("row 2 has no text",)),
    ("a.jsonl", [{"text": "a"}, {"text": ["b"]}], ("row 2: its text, message 1,",)),
    ("a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], ("row 2 has an empty answer",)),
    ("a.jsonl", [{"prompt": "a", "completion": "b"}, {"completion": "b"}], ("row 2 has an empty prompt",)),
    ("a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": [ASSISTANT], "completion": "b"}], ("row 2 has an empty prompt",)),
    ("a.jsonl", [{"messages": [USER]}], ("row 1: its messages", "does not end in the assistant's answer")),
    ("a.jsonl", [{"messages": "hello"}], ("row 1: its messages",)),
    ("a.jsonl", [{"messages": []}], ("row 1: its messages is an empty list",)),
    ("a.csv", "prompt,completion\na,b\n,c\n", ("row 2 has an empty prompt",)),
    ("a.csv", "text\n", ("no data row",)),
    ("a.txt", "", ("empty",)), ("a.txt", "\0 \0\n", ("empty",)), ("a.txt", b"a\nb\nc\xff", ("line 3", "0xff", "UTF-8")),
])
def test_faults_name_the_row(folder, name, content, words):
    path = put(folder / name, content)
    with pytest.raises(UserError) as caught:
        read_texts(path, BYTES, 100, seed=0, on_prompt=False)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and all(word in message for word in words), message
