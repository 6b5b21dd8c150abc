"""Tokenized corpora as .bin and .idx, by a writer of our own; what is damaged is refused in one line that names the file."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.binidx import Pieces, corpus_at
from src.data.examples import read_texts
from src.data.packing import Text, pack_texts
from src.errors import UserError
from src.tokenizer import load_tokenizer
from src.training.batches import PairBatches
from src.training.inputs import Data

BYTES = load_tokenizer("bytes")
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def index(sizes: list[int], documents: list[int], code: int = 8, version: int = 1, magic: bytes = b"MMIDIDX\0\0") -> bytes:
    """An index by the published layout, value by value."""
    width = np.dtype(CODES.get(code, "<u2")).itemsize
    data = magic + struct.pack("<Q", version) + struct.pack("<B", code) + struct.pack("<QQ", len(sizes), len(documents))
    data += b"".join(struct.pack("<i", size) for size in sizes)
    data += b"".join(struct.pack("<q", width * sum(sizes[:number])) for number in range(len(sizes)))
    return data + b"".join(struct.pack("<q", border) for border in documents)


def put(folder: Path, entries: list[list[int]], documents: list[int] | None = None, code: int = 8) -> Path:
    """A corpus of these entries, each a document unless `documents` says otherwise; the path of its .bin."""
    path = folder / "corpus.bin"
    path.write_bytes(np.array(sum(entries, []), CODES[code]).tobytes())
    borders = list(range(len(entries) + 1)) if documents is None else documents
    path.with_suffix(".idx").write_bytes(index(list(map(len, entries)), borders, code))
    return path


def read(path: Path, max_len: int = 1000):
    return read_texts(path, BYTES, max_len, seed=0, on_prompt=False)


def tokens(texts) -> list[list[int]]:
    return [text.tokens for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("binidx")


texts_of_rwkv = st.lists(st.text(st.characters(exclude_characters="\0<\ufeff", exclude_categories=["Cs"]), min_size=1)
                         .filter(str.strip), min_size=1, max_size=4)


@given(documents=texts_of_rwkv, max_len=st.integers(1, 9), code=st.sampled_from([3, 4, 5, 8]))
def test_a_corpus_gives_what_its_texts_give(folder, documents, max_len, code):
    """As RWKV-LM makes it: an entry for each document, with the end-of-text token 0 at its end."""
    entries = [[*document.encode(), 0] for document in documents]
    (folder / "documents.txt").write_text("\0".join(documents), encoding="utf-8", newline="")
    expected, counts = read(folder / "documents.txt", max_len)
    path = put(folder, entries, code=code)
    for given_path in (path, path.with_suffix(".idx"), path.with_suffix(""), str(path)):
        texts, report = read(given_path, max_len)
        assert isinstance(texts, Pieces) and list(texts) == expected and report == counts
    # The whole corpus as one entry gives the same; so does one written in parts of documents.
    for whole in (put(folder, [sum(entries, [])], code=code), put(folder, [[token] for token in sum(entries, [])],
                  [0, *np.cumsum([len(entry) for entry in entries]).tolist()], code)):
        assert (list(read(whole, max_len)[0]), read(whole, max_len)[1]) == (expected, counts)


def test_documents_without_an_end_are_those_of_the_index(tmp_path):
    """Megatron-LM's without --append-eod: tokens as they are, nothing added."""
    texts, counts = read(put(tmp_path, [[5, 6, 7], [8, 9]]))
    assert tokens(texts) == [[5, 6, 7], [8, 9]] and (counts.rows, counts.trained, counts.cut, counts.dropped) == (2, 3, 0, 0)
    texts, _ = read(put(tmp_path, [[5, 6], [7], [8, 9]], documents=[0, 2, 2, 3]))  # of several sentences; an empty one
    assert tokens(texts) == [[5, 6, 7], [8, 9]]
    for borders in ([], [0]):  # no documents known
        assert tokens(read(put(tmp_path, [[5, 6], [7, 1], [8, 9]], documents=borders))[0]) == [[5, 6], [7, 1], [8, 9]]


def test_a_long_document_is_cut_and_one_of_a_token_is_left_out(tmp_path):
    texts, counts = read(put(tmp_path, [[1, 2, 3, 4, 5, 6, 0, 7], [0], [0, 0], [8, 0, 0]]), max_len=3)
    assert tokens(texts) == [[1, 2, 3, 4], [4, 5, 6, 0], [8, 0]]
    assert all(text.trained == [True] * len(text.tokens) for text in texts)
    assert (counts.rows, counts.trained, counts.cut) == (2, 7, 1)


def test_tokens_stay_in_the_file(tmp_path):
    """Of 80 MB, only those of the texts that are used are copied; counted by Python's own allocations."""
    import tracemalloc

    path = tmp_path / "large.bin"
    size, count = 40_000, 1000
    with path.open("wb") as file:
        for number in range(count):
            file.write(np.full(size, number % 250 + 1, "<u2").tobytes())
    path.with_suffix(".idx").write_bytes(index([size] * count, list(range(count + 1))))
    tracemalloc.start()
    texts, counts = read(path, max_len=1000)
    batches = PairBatches(texts, epoch_steps=0, micro_bsz=2, batch_tokens=0, accumulate=1, seed=0, first_epoch=0, world_size=1)
    first = batches.epoch(0, 0)[0]
    batch = pack_texts([texts[at] for at in first.indices])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts.trained == count * (size - 1) and len(texts) == 40 * count and len(batch.targets) <= 2000
    assert peak < 60_000_000 and held < 10_000_000, (peak, held)


def test_epochs_are_those_of_texts_in_memory(tmp_path):
    generator = np.random.default_rng(0)
    texts, _ = read(put(tmp_path, [generator.integers(1, 256, size).tolist() for size in generator.integers(2, 30, 40)]), 10)
    for batch_tokens in (0, 25):
        one, other = (list(PairBatches(items, 0, 3, batch_tokens, 2, 1, 0, 1).epoch(0, 0)) for items in (texts, list(texts)))
        assert one == other and sorted(at for batch in one for at in batch.indices) == list(range(len(texts)))


def test_either_file_tells_one_corpus_from_another(tmp_path):
    path = put(tmp_path, [[1, 2], [3, 4, 5]])
    digests = {Data(str(path), [], {}).sha256(), Data(str(path.with_suffix("")), [], {}).sha256()}
    assert len(digests) == 1
    for entries in ([[1, 2, 3], [4, 5]], [[1, 2], [3, 4, 6]]):
        digests.add(Data(str(put(tmp_path, entries)), [], {}).sha256())
    assert len(digests) == 3


def test_a_slice_of_the_texts(tmp_path):
    texts, _ = read(put(tmp_path, [[1, 2], [3, 4], [5, 6]]))
    assert list(texts[1:]) == [Text([3, 4], [True, True]), Text([5, 6], [True, True])] and texts[-1].tokens == [5, 6]


@pytest.mark.parametrize("path", ["/", ".", ".."])
def test_a_folder_is_no_corpus(path):
    assert corpus_at(path) is None


def test_what_is_no_corpus(tmp_path):
    assert corpus_at(tmp_path / "a.txt") is None and corpus_at(tmp_path / "corpus") is None
    put(tmp_path, [[1, 2]])
    assert corpus_at(tmp_path / "corpus") == (tmp_path / "corpus.bin", tmp_path / "corpus.idx")
    (tmp_path / "corpus").write_text("A text.")  # a file of that name is meant
    assert corpus_at(tmp_path / "corpus") is None


GOOD = [3, 2]
BIN = np.arange(1, 6).astype("<u2").tobytes()


@pytest.mark.parametrize(("idx", "data", "words"), [
    (None, BIN, ("corpus.bin: corpus.idx is missing",)), (index(GOOD, [0, 1, 2]), None, ("corpus.idx: corpus.bin is missing",)),
    (b"", BIN, ("corpus.idx: is not the index",)), (b"MMIDIDX\0\0\1", BIN, ("corpus.idx: is not the index",)),
    (index(GOOD, [0, 1, 2], magic=b"TNTIDX\0\0\0"), BIN, ("corpus.idx", "fairseq", "--dataset-impl mmap")),
    (index(GOOD, [0, 1, 2], version=2), BIN, ("corpus.idx", "version 2")),
    (index(GOOD, [0, 1, 2], code=6), BIN, ("corpus.idx", "tokens of type 6")),
    (index(GOOD, [0, 1, 2], code=99), BIN, ("corpus.idx", "tokens of type 99")),
    (index(GOOD, [0, 1, 2])[:-1], BIN, ("corpus.idx: has 81 bytes where its header announces 82",)),
    (index(GOOD, [0, 1, 2]) + b"\0", BIN, ("corpus.idx: has 83 bytes where its header announces 82",)),
    (index(GOOD, [])[:18] + struct.pack("<QQ", 2**63, 2**62), BIN, ("corpus.idx: has 34 bytes", "damaged")),
    (index([], [0]), b"", ("corpus.idx: has no documents",)), (index([0, 0], [0, 1, 2]), b"", ("corpus.bin: has no tokens",)),
    (index([3, -2], [0, 1, 2]), BIN, ("corpus.idx: entry 2 has -2 tokens",)),
    (index([6, -1], [0, 1, 2]), BIN, ("corpus.idx: entry 2 has -1 tokens",)),
    (index([3, 3], [0, 1, 2]), BIN, ("corpus.bin: has 10 bytes where corpus.idx describes 12",)),
    (index([3, 1], [0, 1, 2]), BIN, ("corpus.bin: has 10 bytes where corpus.idx describes 8",)),
    (index([3, 2**31 - 1], [0, 1, 2]), BIN, ("corpus.bin: has 10 bytes",)),
    (index(GOOD, [0, 1, 2]), b"", ("corpus.bin: has 0 bytes",)),
    (index(GOOD, [0, 1, 2])[:50] + struct.pack("<q", 2) + index(GOOD, [0, 1, 2])[58:], BIN,
     ("corpus.idx: entry 2 begins at byte 2 where the ones before it end at byte 6",)),
    (index(GOOD, [0, 1, 2])[:50] + struct.pack("<q", -6) + index(GOOD, [0, 1, 2])[58:], BIN, ("entry 2 begins at byte -6",)),
    *[(index(GOOD, borders), BIN, ("corpus.idx: its borders of documents do not rise from 0 to its 2 entries",))
      for borders in ([0, 1], [1, 2], [0, 3], [0, 2, 1, 2], [0, -1, 2], [0, 2, 2**40])],
    (index([1, 1], [0, 1, 2]), BIN[:4], ("corpus.bin: has no document of two tokens or more",)),
])
def test_what_is_damaged_is_refused_in_a_line(tmp_path, idx, data, words):
    for name, content in (("corpus.idx", idx), ("corpus.bin", data)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    for name in ("corpus.bin", "corpus.idx", "corpus"):
        if name == "corpus" and None in (idx, data):
            continue
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        message = str(caught.value)
        assert "\n" not in message and message.startswith(str(tmp_path)) and all(word in message for word in words), message


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="--train_data_file or --eval_file: .*none.bin does not exist"):
        read(tmp_path / "none.bin")
    (tmp_path / "corpus.idx").mkdir()
    (tmp_path / "corpus.bin").touch()
    with pytest.raises(UserError, match="corpus.idx is not a file"):
        read(tmp_path / "corpus.bin")


@pytest.mark.parametrize(("code", "bad"), [(8, 256), (8, 65535), (4, -1), (5, 2**40), (3, -32768)])
def test_a_token_beyond_the_vocabulary_names_file_and_document(tmp_path, code, bad):
    path = put(tmp_path, [[1, 2, 0], [3, 4, bad, 0], [bad, 0]], code=code)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == (f"{path}: document 2 has the token {bad} (number 6 of the file), and the vocabulary has 256; "
                                 "choose the --tokenizer that the corpus was made with")


def test_ends_and_ids_are_found_across_the_parts_that_are_looked_at(tmp_path, monkeypatch):
    entries = [[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 0]]
    for at_once in range(1, 13):
        monkeypatch.setattr("src.data.binidx._AT_ONCE", at_once)
        assert tokens(read(put(tmp_path, [sum(entries, [])]))[0]) == entries
        with pytest.raises(UserError, match="document 3 has the token 999"):
            read(put(tmp_path, [*entries[:2], [6, 999]]))


@given(data=st.data())
def test_any_damage_is_refused_or_gives_texts_within_the_vocabulary(folder, data):
    path = put(folder, [[1, 2, 0], [3, 4, 5, 0], [6, 0]])
    target = data.draw(st.sampled_from([path, path.with_suffix(".idx")]))
    content = bytearray(target.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    target.write_bytes(content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        texts, _ = read(path, max_len=3)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    assert len(texts) == len(list(texts)) and all(0 <= token < 256 for text in texts for token in text.tokens)


def test_every_token_but_the_first_is_predicted_once(tmp_path):
    for length, max_len in ((2, 1), (5, 2), (6, 5), (7, 5), (11, 5), (12, 5)):
        texts, _ = read(put(tmp_path, [list(range(1, length + 1))]), max_len)
        assert [token for text in texts for token in text.tokens[1:]] == list(range(2, length + 1))
        assert all(one.tokens[-1] == other.tokens[0] for one, other in pairwise(texts))
