"""What takes a hostile file's readers longer grows no faster than the file."""

import csv
import io
import json
import time
from collections.abc import Callable

import pyarrow
import pytest

from src.data.check import check_pairs
from src.data.examples import read_texts
from src.data.faults import usable
from src.data.read import read_pairs
from src.errors import UserError
from src.tokenizer.byte import ByteTokenizer

# Seconds of CPU: each of these takes less than two, and those that went through a file once for each of its parts took minutes.
MOST = 6.0
HEADER = "prompt,chosen,reject"
TEXTS = {"prompt": "a", "chosen": "b", "reject": "c"}
USER, ASSISTANT, SYSTEM = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))


def row(*cells: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def variants(name: str, count: int) -> list[str]:
    """`name` with its letters large and small."""
    return ["".join(letter.upper() if number >> place & 1 else letter for place, letter in enumerate(name))
            for number in range(count)]


def shared_dictionary() -> bytes:
    words, buffer = pyarrow.array(map(str, range(40_000))), io.BytesIO()
    batch = pyarrow.record_batch([pyarrow.DictionaryArray.from_arrays(pyarrow.array([0], pyarrow.int32()), words)] * 3,
                                 names=HEADER.split(","))
    with pyarrow.ipc.new_stream(buffer, batch.schema) as writer:
        for _ in range(15_000):
            writer.write_batch(batch)
    return buffer.getvalue()


def of(record: dict) -> str:
    return json.dumps(TEXTS | record)


FILES: dict[str, Callable[[], str | bytes]] = {
    "turns of one speaker.csv": lambda: f"{HEADER}\n{row('Human: a' + 100_000 * f'{2 * chr(10)}Human: a', 'x', 'y')}",
    "empty turns.csv": lambda: f"{HEADER}\n{row('Human: a' + 200_000 * f'{2 * chr(10)}Human:', 'x', 'y')}",
    "names without blank lines.csv": lambda: f"{HEADER}\n{row('User: a' + 100_000 * chr(10).join(('', 'User: a')), 'x', 'y')}",
    "answers of one speaker.csv": lambda: f"{HEADER}\n{row('a', 'Human: a' + 200_000 * f'{2 * chr(10)}Assistant: b', 'y')}",
    "a repeated label.csv": lambda: f"{HEADER}{',label' * 50_000}\n" + "a\n" * 50_000,
    "repeated weights.csv": lambda: f"{HEADER}{',weight,train,kto_tag,loss_weight' * 10_000}\n" + "a\n" * 50_000,
    "a repeated column.csv": lambda: f"chosen,reject{',x' * 50_000}\n" + row("a b", "a c", *["1"] * 49_999, "a" * 200_000),
    "spellings of a column.jsonl": lambda: "\n".join(of({name: 1}) for name in variants("chosen_response", 30_000)),
    "spellings of a weight.jsonl": lambda: "\n".join(of({name: 1}) for name in variants("loss_weight", 2_000) * 15),
    "messages of one user.jsonl": lambda: of({"prompt": [USER] * 50_000}),
    "system messages.jsonl": lambda: of({"prompt": [*[SYSTEM] * 30_000, USER]}),
    "messages of one assistant.jsonl": lambda: of({"prompt": [USER, *[ASSISTANT] * 50_000, USER]}),
    "columns by label.json": lambda: json.dumps(
        {name: dict.fromkeys(map(str, range(10_000)), "a") for name in TEXTS} | {f"c{n}": {} for n in range(20_000)}),
    "keys that collide.csv": lambda: f"{HEADER}\n" + row("[{'role': 'user', 'content': 'a', 'x': {" + ",".join(
        f"{number * (2 ** 61 - 1)}: 1" for number in range(30_000)) + "}}]", "x", "y"),
    "spellings of a prompt.jsonl": lambda: "\n".join(of({name: "a"}) for name in variants("context_messages", 10_000)),
    "quotes of a list.csv": lambda: "prompt,responses,scores\n" + row("x", "['" + "\\' " * 500_000, "[1 2]"),
    "quotes of a history.csv": lambda: f"{HEADER},history\n" + row("x", "y", "z", "'" + "\\'\"" * 500_000),
    "a shared dictionary.arrow": shared_dictionary,
}


@pytest.mark.parametrize("name", FILES)
def test_time_grows_with_the_file(tmp_path, name):
    content, path = FILES[name](), tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    for read in (_pairs, _texts):
        try:
            read(path)
        except UserError as error:
            assert len(str(error)) < 500
    assert time.process_time() - started < MOST


def _pairs(path) -> None:
    reading = read_pairs(path, require_reject=True)
    usable(reading, skip_bad_rows=False)
    check_pairs(reading, ByteTokenizer(), 512, 0)


def _texts(path) -> None:
    read_texts(path, ByteTokenizer(), 512, 0, on_prompt=False)
