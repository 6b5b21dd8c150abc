"""Files that are no tables of texts are reported as what they are, whatever their ending says."""

import io
import pickle
import sqlite3
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from src.data.examples import read_texts
from src.data.read import read_table
from src.errors import UserError
from src.tokenizer import load_tokenizer
from tests.data.test_binidx import put


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name), "x")  # dated 1980, so that a test has one name
    return buffer.getvalue()


def made(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def sqlite(folder) -> bytes:
    with sqlite3.connect(folder / "made.db") as connection:
        pd.DataFrame({"prompt": ["p"]}).to_sql("pairs", connection)
    connection.close()
    return (folder / "made.db").read_bytes()


def safetensors(folder) -> bytes:
    save_file({"a": torch.zeros(2)}, folder / "made.safetensors")
    return (folder / "made.safetensors").read_bytes()


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


PAIRS = [([1], [2], [3], 0.0, 0.0)]
KINDS = [
    (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook; save it as CSV"),
    (zipped("mimetype", "content.xml"), "an OpenDocument file"), (zipped("word/document.xml"), "a Word document"),
    (zipped("pairs.csv"), "a zip archive (pairs.csv); unpack it"), (zipped("a.csv", "b.csv"), "a zip archive (2 files); unpack"),
    (zipped(), "a zip archive; unpack"), (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Excel workbook"),
    (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"), (sqlite, "an SQLite database"),
    (pickle.dumps([Trap()]), "a Python pickle, which is never loaded"),
    (made(pd.DataFrame({"a": [1]}).to_pickle), "a Python pickle"),
    (made(lambda file: torch.save(PAIRS, file)), "a file of PyTorch, such as a checkpoint or a .save under"),
    (made(lambda file: torch.save(PAIRS, file, _use_new_zipfile_serialization=False)), "a Python pickle"),
    (made(lambda file: np.save(file, np.zeros(3))), "a NumPy array"),
    (made(lambda file: np.savez(file, a=np.zeros(3))), "an archive of NumPy arrays"), (safetensors, "a safetensors file"),
    (b"%PDF-1.7\n%\xe2\xe3", "a PDF"), (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    (b"\n<!DOCTYPE html>\n<html>", "a web page"), (b'<?xml version="1.0"?>', "XML"), (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
]


@pytest.mark.parametrize(("data", "words"), KINDS)
@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet", ".bin", ""])
def test_kinds_are_told(tmp_path, data, words, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(data(tmp_path) if callable(data) else data)
    with pytest.raises(UserError) as caught:
        read_table(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and words in message and "\n" not in message and "; " in message


@pytest.mark.parametrize(("name", "data", "words"), [
    ("a.save", made(lambda file: torch.save(PAIRS, file)), "is a .save file, which is already prepared; give it to train.py"),
    ("a.xlsx", zipped("xl/workbook.xml")[:30], "is an Excel workbook"), ("a.pkl", pickle.dumps(PAIRS, 0), "is a Python pickle"),
    ("a.yaml", b"- prompt: p\n  chosen: c\n", "is YAML"),
])
def test_kinds_that_the_ending_tells(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / name)


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "corpus"])
def test_a_tokenized_corpus_is_told_by_any_of_its_names(tmp_path, name):
    put(tmp_path, [[5, 0x83, 0], [6, 0]])
    with pytest.raises(UserError, match=f"{name}: is a tokenized corpus .binidx., which only train.py --sft 1 takes; give"):
        read_table(tmp_path / name)


@pytest.mark.parametrize("header", ["PAR1\t", "PARENT,", "ORC,", "GGUF,", "PK,", "BZh9,", "ARROW1,", "FEA1,", "Obj,"])
def test_a_header_is_no_mark_of_a_kind(tmp_path, header):
    header = f"{header}prompt{header[-1]}chosen"
    (tmp_path / "a.csv").write_text(f"{header}\n{header}\n")
    assert read_table(tmp_path / "a.csv").names == header.replace("\t", ",").split(",")


def test_documents_may_be_marked_up_but_are_no_binary_files(tmp_path):
    tokenizer = load_tokenizer("bytes", None)
    (tmp_path / "page.txt").write_text("<!DOCTYPE html>")
    texts, _ = read_texts(tmp_path / "page.txt", tokenizer, 100, 0, False)
    assert texts[0].tokens[:-1] == list(b"<!DOCTYPE html>")
    (tmp_path / "paper.txt").write_bytes(b"%PDF-1.7\n")
    with pytest.raises(UserError, match="is a PDF"):
        read_texts(tmp_path / "paper.txt", tokenizer, 100, 0, False)
