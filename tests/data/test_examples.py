"""What `--sft 1` trains on: which tokens have a loss, where long texts are cut, and which columns are known."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from src.data.examples import read_texts
from src.data.load_template import load_template
from src.errors import UserError
from src.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.tokenizer.files import KINDS, saved

pytestmark = pytest.mark.usefixtures("storage")

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
    # Other tools' names, and what belongs to a prompt.
    ({"query": "Why?", "response": "So.", "system": "Hm", "history": [["Hi", "Ho"]]},
     "System: Hm\n\nUser: Hi\n\nAssistant: Ho\n\nUser: Why?\n\nAssistant:[ So.\n\n]"),
    ({"prompt": "User: Why?\n\nAssistant:", "completion": "So."}, PLAIN),
    ({"prompt": "User: Why?\n\nAssistant:", "completion": "User: Why?\n\nAssistant: So."}, PLAIN),
    ({"messages": [USER, ASSISTANT], "system": "Hm"}, "System: Hm\n\nUser: Why?\n\nAssistant:[ So.\n\n]"),
    ({"messages": json.dumps([USER, ASSISTANT])}, PLAIN), ({"messages": str([USER, ASSISTANT])}, PLAIN),
    ({"instruction": "Why?", "output": ASSISTANT}, PLAIN), ({"chosen_messages": [USER, ASSISTANT]}, PLAIN),
    # Messages of weight 0 are read and not learned.
    ({"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]},
     "User: Why?\n\nAssistant: So.\n\nUser: Why?\n\nAssistant:[ So.\n\n]"),
    ({"messages": [USER, ASSISTANT, USER, ASSISTANT | {"train": False}]},
     "User: Why?\n\nAssistant:[ So.\n\n]User: Why?\n\nAssistant: So.\n\n"),
    ({"text": "Any text.\n\nOf two paragraphs."}, "[Any text.\n\nOf two paragraphs.\0]"),
])
def test_known_columns(folder, record, text):
    texts, report = read_texts(put(folder / "a.jsonl", [record]), BYTES, 1000, seed=0, on_prompt=False)
    assert list(map(shown, texts)) == [text]  # the first template drawn from seed 0 is User
    assert (report.rows, report.cut, report.dropped) == (1, 0, 0)
    assert report.trained == sum(texts[0].trained) - texts[0].trained[0]
    everything, _ = read_texts(folder / "a.jsonl", BYTES, 1000, seed=0, on_prompt=True)
    assert everything[0].tokens == texts[0].tokens
    without_loss = any(message.get("weight") == 0 or message.get("train") is False for message in record.get("messages", [])
                       if isinstance(message, dict))
    assert sum(not trained for trained in everything[0].trained) == (len(" So.\n\n") if without_loss else 0)


def test_rows_that_are_not_to_be_learned_are_left_out(folder, capsys):
    good, bad = {"prompt": "Why?", "completion": "So."}, {"prompt": "Why?", "completion": "No."}
    for key, yes, no in (("label", True, False), ("label", 1, 0), ("kto_tag", "true", "false"), ("weight", 1, 0.0)):
        path = put(folder / "thumbs.jsonl", [good | {key: yes}, bad | {key: no}, good])
        texts, report = read_texts(path, BYTES, 1000, seed=0, on_prompt=False)
        assert [text.tokens for text in texts] == [list(b"User: Why?\n\nAssistant: So.\n\n")] * 2 and report.rows == 2
        assert capsys.readouterr().err == f"note: {path}: left out 1 row that {key} marks as not to be learned\n"
    # Classes are no thumbs, and a plain text has no answer that they could be of.
    for rows in ([good | {"label": "math"}, good | {"label": 1}], [{"text": "a b", "label": 0}, {"text": "c d", "label": 1}]):
        path = put(folder / "classes.jsonl", rows)
        assert read_texts(path, BYTES, 1000, seed=0, on_prompt=False)[1].rows == 2
        assert capsys.readouterr().err == f"note: {path}: not used: column label\n"


def test_faulty_rows_are_left_out_on_demand(folder, capsys):
    path = put(folder / "faulty.jsonl", [{"instruction": "Hi.", "output": "Ho."}, {"instruction": "Hi.", "output": ""},
                                         {"instruction": "Hi.", "output": [ASSISTANT | {"weight": 0}]}])
    with pytest.raises(UserError, match="2 of 3 rows can't be used: empty answer: row 2; answer without a loss: row 3; the "
                                        r"first: row 2 has an empty answer \(its output\)"):
        read_texts(path, BYTES, 1000, seed=0, on_prompt=False)
    texts, report = read_texts(path, BYTES, 1000, seed=0, on_prompt=False, skip_bad_rows=True)
    assert len(texts) == report.rows == 1
    assert report.skipped_rows == {"count": 2, "rows": {"empty answer": [2], "answer without a loss": [3]}}
    assert "left out 2 of 3 rows" in capsys.readouterr().err


def test_a_question_that_nothing_answers_is_named(folder, capsys):
    path = put(folder / "open.jsonl", [{"messages": [USER, ASSISTANT, USER]}, {"messages": [USER, ASSISTANT]}])
    read_texts(path, BYTES, 1000, seed=0, on_prompt=False)
    assert capsys.readouterr().err == f"note: {path}: not used: the last message of 1 conversation, which is the user's\n"


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
    content = end.join(documents)
    for name, data in (("a.txt.gz", gzip.compress(content.encode())), ("a.TXT", content.encode("utf-16"))):
        (folder / name).write_bytes(data)
        assert read_texts(folder / name, BYTES, max_len, seed=0, on_prompt=False) == (texts, report)
    assert report.cut == sum(len(document) - 1 > max_len for document in whole)
    put(folder / "documents.jsonl", [{"text": document} for document in documents])
    assert read_texts(folder / "documents.jsonl", BYTES, max_len, seed=0, on_prompt=False) == (texts, report)


def test_a_conversation_loses_its_beginning_and_an_answer_too_long_the_row(folder):
    records = [{"prompt": "Why is it so?", "completion": "So."}, {"prompt": "Why?", "completion": "x" * 40}]
    path = put(folder / "long.jsonl", records)
    texts, report = read_texts(path, BYTES, 20, seed=0, on_prompt=False)
    assert list(map(shown, texts)) == ["o?\n\nAssistant:[ So.\n\n]"[-22:]]
    assert (report.cut, report.dropped) == (1, 1)
    with pytest.raises(UserError, match="2 of 2 texts have an answer of over 5 tokens; raise --ctx_len"):
        read_texts(path, BYTES, 5, seed=0, on_prompt=False)


def test_an_answer_too_long_with_text_behind_the_token_that_ends_it(folder):
    path = put(folder / "words.jsonl", [{"prompt": "Why?", "completion": "x" * 30}])
    (folder / "words.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
                                        "{% if add_generation_prompt %}assistant: {% endif %}")
    template = load_template(str(folder / "words.jinja"), BYTES)
    texts, report = read_texts(path, BYTES, 40, seed=0, on_prompt=False, template=template)
    assert sum(texts[0].trained) == 32 and report.dropped == 0
    with pytest.raises(UserError, match="1 of 1 texts have an answer of over 31 tokens"):
        read_texts(path, BYTES, 31, seed=0, on_prompt=False, template=template)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", [{"prompt": "a", "label": "b"}], ("has no column to train on", "prompt, label", "messages, or text")),
    ("a.jsonl", [{"text": "a"}, {"text": " "}], ("row 2 has no text",)),
    ("a.jsonl", [{"text": "a"}, {"text": ["b"]}], ("row 2: its text, message 1,",)),
    ("a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], ("row 2 has an empty answer",)),
    ("a.jsonl", [{"prompt": "a", "completion": "b"}, {"completion": "b"}], ("row 2 has an empty prompt",)),
    ("a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": [ASSISTANT], "completion": "b"}], ("row 2: its prompt",)),
    ("a.jsonl", [{"messages": [USER]}], ("row 1: its messages", "does not end in the assistant's answer")),
    ("a.jsonl", [{"messages": "hello"}], ("row 1: its messages",)),
    ("a.jsonl", [{"messages": []}], ("row 1 has no messages in messages",)),
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


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace always", "Metaspace first", "Unigram", "ByteLevel with a prefix"])
def test_a_conversation_s_pieces_join_to_the_whole_text(folder, kind):
    """No piece but the first has what a tokenizer puts before a text."""
    path = saved(KINDS[kind](), folder)
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "the cat"), ("assistant", "sat"), ("user", "who?"), ("assistant", "12 cats"))]
    texts, report = read_texts(put(folder / "a.jsonl", [{"messages": turns}]), HuggingFaceTokenizer(path), 1000, 0, False)
    whole = "User: the cat\n\nAssistant: sat\n\nUser: who?\n\nAssistant: 12 cats\n\n"
    library = Tokenizer.from_file(path)
    assert library.decode(texts[0].tokens, skip_special_tokens=False).removeprefix(" ") == whole
    if kind != "ByteLevel with a prefix":  # where GPT-2 splits a blank line by whether a letter stands behind it
        assert texts[0].tokens == library.encode(whole, add_special_tokens=False).ids
    assert report.changes.texts == 0 and report.changes.looked_at == 4


def test_changed_texts_are_counted(folder):
    tokenizer = HuggingFaceTokenizer(saved(KINDS["Prepend without bytes"](), folder))
    path = put(folder / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "é"}])
    assert read_texts(path, tokenizer, 1000, 0, False)[1].changes.rows == (2,)
    assert read_texts(put(folder / "b.txt", "abc\0é\0\x01"), tokenizer, 1000, 0, False)[1].changes.rows == (2, 3)
