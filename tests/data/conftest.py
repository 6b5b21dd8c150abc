"""Where rows and tokens are kept, in memory as those of small files are or in files, and readings and templates of texts."""

import json
from collections.abc import Callable, Iterator

import pytest

from src.data import examples, json_window, source, spill
from src.data.faults import Reading
from src.data.load_template import load_template
from src.data.read import read_pairs
from src.data.templates import Template
from src.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["in memory", "in files"])
def storage(request) -> Iterator[None]:
    """Tests that use this run twice, the second time with everything in files and read in the smallest pieces."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in files":
            for place, name, size in ((spill, "IN_MEMORY", 0), (spill, "BLOCK", 100), (source, "_PIECE", 3),
                                      (json_window, "_PIECE", 3), (examples, "_PIECE", 3)):
                patch.setattr(place, name, size)
        yield


@pytest.fixture
def read(tmp_path) -> Callable[..., Reading]:
    """`read(record, ...)` -> the reading of a JSONL of these records as pairs or thumbs."""

    def make(*records: dict, require_reject: bool = True) -> Reading:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return read_pairs(path, require_reject)

    return make


@pytest.fixture
def template(tmp_path) -> Callable[..., Template]:
    """Makes a template of a source, with the special tokens of a tokenizer_config.json if there are any."""
    def make(source: str, tokenizer=None, **special: str):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = folder / ("tokenizer_config.json" if special else "chat.jinja")
        path.write_text(json.dumps({"chat_template": source, **special}) if special else source)
        return load_template(str(path), tokenizer or load_tokenizer("world"))

    return make
