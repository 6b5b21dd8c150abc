"""Reads a model's chat template and its special tokens from the files that Hugging Face's tools write.

Their layouts: a `tokenizer_config.json` with the template in it, one with `chat_template.jinja` beside it, and a
`chat_template.json`. A file with just a template may have any name. All of these are untrusted.
"""

from pathlib import Path
from typing import Any

from src.checked_json import BadJson, parse_json
from src.console import say, short
from src.data.rendering import ChatTemplate, Renderer
from src.errors import UserError
from src.files import existing_file

LARGEST = 1 << 20  # bytes of a template
LARGEST_JSON = 16 << 20  # some list thousands of added tokens
CONFIG_FILE = "tokenizer_config.json"
JINJA_FILE = "chat_template.jinja"
PROCESSOR_FILE = "chat_template.json"
_TOKEN = (str, None, {"content": str})
_SHAPE = {"chat_template?": (str, None, [{"name": str, "template": str}], {str: str}),
          **{f"{name}_token?": _TOKEN for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}}
# Where tokens of the model's own have names.
_MORE_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")
_MOST_DIGITS = 40  # model_max_length is about 10^30 where a tokenizer has no limit


def read_chat_template(path: str | Path) -> ChatTemplate:
    """Read a chat template, and check that it compiles.

    The special tokens are those of a `tokenizer_config.json`: of the file itself, or else of the one beside it, if there is one.
    Beside a `tokenizer_config.json`, `chat_template.jinja` takes precedence over the template in it, as in transformers.

    Raises UserError, naming the file, if one of them is missing, too large, not UTF-8, or damaged, if there is no template, or if
    Jinja can't compile it.
    """
    if Path(path).is_dir():
        raise UserError(f"--template: {path} is not a file but a folder; give one of the files in it, such as {CONFIG_FILE}")
    path = existing_file(path, "--template")
    config = _config(path)
    source = _text(path, LARGEST) if config is None else _source(path, config)
    if config is None or path.name == PROCESSOR_FILE:
        beside = path.with_name(CONFIG_FILE)
        config = _parsed(beside, _text(beside, LARGEST_JSON)) if beside.is_file() else {}
    template = ChatTemplate(str(path), source, _special_tokens(config))
    with Renderer(template) as renderer:
        renderer.start()
    return template


def _config(path: Path) -> dict[str, Any] | None:
    """The values of a JSON file; None if the file is a template."""
    if path.suffix.lower() == ".json":
        return _parsed(path, _text(path, LARGEST_JSON))
    try:
        # Under another name, a config would pass for a template that renders to its own text.
        return parse_json(_text(path, LARGEST), _SHAPE | {"chat_template": object}, _MOST_DIGITS)
    except BadJson:
        return None


def _source(path: Path, config: dict[str, Any]) -> str:
    """The template that a JSON file has or stands for."""
    beside = path.with_name(JINJA_FILE)
    found = config.get("chat_template")
    if path.name == CONFIG_FILE and beside.is_file():
        if found is not None:
            say(f"note: {path}: {JINJA_FILE} beside it takes precedence over the template in it")
        return _text(beside, LARGEST)
    if isinstance(found, list):
        found = {template["name"]: template["template"] for template in found}
    if isinstance(found, dict):
        if "default" not in found:
            names = short(", ".join(found), 200) or "none"
            raise UserError(f"{path}: has several chat templates, but none is named default ({names}); put the one to use into a "
                            "file of its own")
        found = found["default"]
    if found is None:
        instead = f", nor is {JINJA_FILE} beside it" if path.name == CONFIG_FILE else ""
        raise UserError(f"{path}: there is no chat_template in it{instead}; choose a file that has one")
    if len(found) > LARGEST:
        raise _too_large(path, LARGEST, "its chat template")
    return found


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The tokens that transformers hands to a template: all that have a name, as texts.

    Those without a name (a list of additional special tokens) it does not hand over.
    """
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    for key in _MORE_TOKENS:
        if isinstance(config.get(key), dict):
            named |= config[key]
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        return parse_json(text, _SHAPE, _MOST_DIGITS)
    except BadJson as error:
        raise UserError(f"{path}: can't be read, {error}; choose another chat template") from None


def _text(path: Path, largest: int) -> str:
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise _too_large(path, largest, "it")
    try:
        return data.decode("utf-8-sig")  # editors may put a byte order mark first, which is no text
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _too_large(path: Path, largest: int, what: str) -> UserError:
    return UserError(f"{path}: {what} is over {largest >> 20} MB, too large for a chat template; choose another file")
