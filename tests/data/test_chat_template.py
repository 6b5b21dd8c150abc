"""Chat templates: where they are read from, and that they render to what their models expect."""

import json
from pathlib import Path

import pytest

from src.data.chat_template import CONFIG_FILE, JINJA_FILE, LARGEST, LARGEST_JSON, PROCESSOR_FILE, read_chat_template
from src.data.rendering import ChatTemplate, Job, Renderer
from src.errors import UserError
from tests.data.chat_templates import CASES, CHATML, TOKENS, Case

ONE = "{{ messages[0].content }}"


def config(folder: Path, values: object = None, name: str = CONFIG_FILE, **more: object) -> Path:
    path = folder / name
    path.write_text(json.dumps((values or {}) | more if not isinstance(values, list) else values), encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_texts(case: Case):
    with Renderer(ChatTemplate("a", case.template, TOKENS)) as renderer:
        assert renderer.render([Job(case.messages, case.prompt)]) == [case.text]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_as_transformers(tmp_path, case: Case):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    path = config(tmp_path, chat_template=case.template, tokenizer_class="PreTrainedTokenizerFast", model_max_length=10**30,
                  bos_token={"__type": "AddedToken", "content": "<s>", "special": True}, eos_token="</s>", pad_token=None,
                  image_token="<img>", add_bos_token=True, extra_special_tokens={"video_token": "<video>"})
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    template = read_chat_template(path)
    with Renderer(template) as renderer:
        assert renderer.render([Job(case.messages, case.prompt)]) == [
            tokenizer.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=case.prompt)]
    assert template.special_tokens == tokenizer.special_tokens_map


@pytest.mark.parametrize("name", ["a.jinja", "a.j2", "a.txt", "a", JINJA_FILE, "a b.template"])
def test_a_file_of_any_ending_is_a_template(tmp_path, name):
    path = tmp_path / name
    path.write_text(CHATML, encoding="utf-8")
    assert read_chat_template(path) == ChatTemplate(str(path), CHATML, {})
    config(tmp_path, TOKENS, chat_template="another")
    assert read_chat_template(path) == ChatTemplate(str(path), CHATML, TOKENS)


@pytest.mark.parametrize("source", ['{"a": 1}', '{"role": "{{ messages[0].role }}"}', "[1]", '"text"', "",
                                    "{%- if true %}{% endif %}"])
def test_a_template_that_resembles_json(tmp_path, source):
    path = tmp_path / "a.jinja"
    path.write_text(source, encoding="utf-8")
    assert read_chat_template(path).source == source


def test_a_config_under_another_name(tmp_path):
    path = config(tmp_path, TOKENS, "saved", chat_template=ONE)
    assert read_chat_template(path) == ChatTemplate(str(path), ONE, TOKENS)


@pytest.mark.parametrize("name", ["a.jinja", CONFIG_FILE])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    path = tmp_path / name
    path.write_text(ONE if name == "a.jinja" else json.dumps({"chat_template": ONE}), encoding="utf-8-sig")
    assert read_chat_template(path).source == ONE


@pytest.mark.parametrize("template", [ONE, [{"name": "rag", "template": "no"}, {"name": "default", "template": ONE}],
                                      {"default": ONE, "tool_use": "no"}])
def test_a_template_in_a_config(tmp_path, template):
    path = config(tmp_path, TOKENS, chat_template=template)
    assert read_chat_template(path) == ChatTemplate(str(path), ONE, TOKENS)


def test_a_template_beside_a_config(tmp_path, capsys):
    (tmp_path / JINJA_FILE).write_text(ONE, encoding="utf-8")
    path = config(tmp_path, TOKENS)
    assert read_chat_template(path) == ChatTemplate(str(path), ONE, TOKENS)
    assert capsys.readouterr().err == ""
    config(tmp_path, TOKENS, chat_template="another")
    assert read_chat_template(path).source == ONE
    assert capsys.readouterr().err == f"note: {path}: {JINJA_FILE} beside it takes precedence over the template in it\n"


def test_a_processors_template(tmp_path):
    path = config(tmp_path, name=PROCESSOR_FILE, chat_template=ONE)
    assert read_chat_template(path) == ChatTemplate(str(path), ONE, {})
    config(tmp_path, TOKENS, chat_template="another")
    (tmp_path / JINJA_FILE).write_text("a third", encoding="utf-8")
    assert read_chat_template(path) == ChatTemplate(str(path), ONE, TOKENS)


def test_special_tokens(tmp_path):
    path = config(tmp_path, chat_template=ONE, model_max_length=10**30, add_bos_token=True, clean_up_tokenization_spaces=False,
                  bos_token={"content": "<s>", "lstrip": False}, eos_token="\ud800", pad_token=None, image_token="<img>",
                  extra_special_tokens={"video_token": {"content": "<video>"}}, additional_special_tokens=["<x>"],
                  added_tokens_decoder={"0": {"content": "<s>"}})
    assert read_chat_template(path).special_tokens == {
        "bos_token": "<s>", "eos_token": "\ud800", "image_token": "<img>", "video_token": "<video>"}


def test_a_fingerprint_is_of_source_and_tokens():
    prints = [ChatTemplate(path, source, tokens).fingerprint for path, source, tokens in (
        ("a", ONE, {}), ("b", ONE, {}), ("a", ONE + " ", {}), ("a", ONE, {"bos_token": "x"}), ("a", ONE, {"eos_token": "x"}),
        ("a", "\ud83d\ude00", {}), ("a", "\U0001f600", {}))]
    assert prints[0] == prints[1] and len(set(prints)) == len(prints) - 1 and all(len(digest) == 64 for digest in prints)
    assert ChatTemplate("a", ONE, {"a": "1", "b": "2"}).fingerprint == ChatTemplate("a", ONE, {"b": "2", "a": "1"}).fingerprint


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jinja", b"a" * (LARGEST + 1), "it is over 1 MB"),
    (CONFIG_FILE, b" " * (LARGEST_JSON + 1), "it is over 16 MB"),
    (CONFIG_FILE, json.dumps({"chat_template": "a" * (LARGEST + 1)}).encode(), "its chat template is over 1 MB"),
    ("a.jinja", b"abc\xff", r"is not UTF-8 \(byte 3\)"), (CONFIG_FILE, b"\xff\xfe{\0}\0", "is not UTF-8"),
    (CONFIG_FILE, b'{"chat_template": "a', "not JSON"), (CONFIG_FILE, b'["a"]', "a list where an object is expected"),
    (CONFIG_FILE, b'{"chat_template": 3}', "chat_template is a whole number where text"),
    (CONFIG_FILE, b'{"chat_template": [{"name": "a"}]}', r"chat_template\[0\] lacks template"),
    (CONFIG_FILE, b'{"chat_template": "a", "bos_token": 3}', "bos_token is a whole number"),
    (CONFIG_FILE, b'{"a":' * 70 + b"1" + b"}" * 70, "nested"), (CONFIG_FILE, b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    (CONFIG_FILE, b"{}", f"there is no chat_template in it, nor is {JINJA_FILE} beside it"),
    (CONFIG_FILE, b'{"chat_template": null}', "there is no chat_template in it"),
    (PROCESSOR_FILE, b"{}", "there is no chat_template in it;"),
    (CONFIG_FILE, b'{"chat_template": [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]}',
     r"none is named default \(rag, tool_use\)"),
    (CONFIG_FILE, b'{"chat_template": []}', r"none is named default \(none\)"),
    ("a.jinja", b"{% if true %}\n{% endif %}\n{{ a b }}", "line 3 of the template: expected token 'end of print statement'"),
    ("a.jinja", b"\n{{ 1 | unknown }}", "line 2 of the template: No filter named 'unknown'"),
    ("a.jinja", b"{% for x in y %}", "line 1 of the template: Unexpected end of template"),
    ("a.jinja", b"{% do x %}", "line 1 of the template: Encountered unknown tag 'do'"),
    ("a.jinja", b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}", "the template: RecursionError"),
    ("a.jinja", b"{{ 10 ** (10 ** 10) }}", "takes over 2 s"),
])
def test_what_is_refused(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as found:
        read_chat_template(path)
    assert str(found.value).startswith(f"{path}: ") and "\n" not in str(found.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="--template: .*a.jinja does not exist"):
        read_chat_template(tmp_path / "a.jinja")
    with pytest.raises(UserError, match="is not a file but a folder; give one of the files in it, such as tokenizer_config.json"):
        read_chat_template(tmp_path)


def test_a_damaged_config_beside_a_template(tmp_path):
    (tmp_path / "a.jinja").write_text(ONE, encoding="utf-8")
    path = config(tmp_path, [1])
    with pytest.raises(UserError, match=f"^{path}: can't be read"):
        read_chat_template(tmp_path / "a.jinja")
