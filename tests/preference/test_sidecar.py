"""The sidecar of a `.save`: it belongs to one file, is written with it or not at all, and is checked before it is believed."""

import json
import resource
import signal
from contextlib import contextmanager

import pytest

from src.errors import UserError
from src.preference.entries import Pair
from src.preference.pairs import check_sidecar, check_sidecar_place, load_pairs, save_pairs
from tests.stored_pairs import stored

VOCAB = 256
TEMPLATE = {"name": "g1", "fingerprint": "aa", "stops": ["\n"], "controls": [], "opening": "", "collapses": False}
GOOD = Pair([1, 2], [3], [4, 5], -1.5, -2.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sidecars")


def test_the_sidecar_is_made_for_people_too(folder):
    """A line for each field, and letters of all languages as they are."""
    save_pairs(folder / "read.save", stored([GOOD]), {"tokenizer": "wörld", "seed": 1})
    lines = (folder / "read.save.json").read_text(encoding="utf-8").splitlines()
    assert [line.split('"')[1] for line in lines[1:-1]] == ["tokenizer", "seed", "count", "sha256"] and "wörld" in lines[1]


@pytest.mark.parametrize(("changes", "words"), [
    ({"tokenizer": 5}, "tokenizer is a whole number where text is expected"), ({"base_model": ["x"]}, "base_model is a list"),
    ({"precision": None}, "precision is null"), ({"quantization": {}}, "quantization is an object"),
    ({"unquantized_blocks": "01"}, "unquantized_blocks is text"), ({"unquantized_blocks": [1.5]}, "unquantized_blocks[0] is a"),
    ({"quantized_otherwise": []}, "quantized_otherwise is a list"), ({"quantized_otherwise": {"a": 1}}, "quantized_otherwise.a"),
    ({"max_len": "512"}, "max_len is text"), ({"templates": {"user": "many"}}, "templates.user is text"),
    ({"references": 1}, "references is a whole number"), ({"base_fingerprint": 3}, "base_fingerprint is"),
    ({"skipped_rows": {"count": 1, "rows": {"empty": 3}}}, "skipped_rows.rows.empty is"), ({"version": 7}, "version is"),
    ({"skipped_rows": {"count": "1", "rows": {}}}, "skipped_rows.count is text"), ({"cut": 0.5}, "cut is a number"),
    ({"seed": "0"}, "seed is text"), ({"dropped": None}, "dropped is null"), ({"changed_texts": [3]}, "changed_texts is a list"),
    ({"template": TEMPLATE | {"stops": ["x" * 600, "y" * 401]}}, "template.stops holds texts of 1001 bytes, of at most 1000"),
    ({"template": TEMPLATE | {"controls": ["<|a|>"] * 1000}}, "template.controls holds texts of 5000 bytes, of at most 1000"),
    ({"seed": 10 ** 30}, "beyond 64 bits"), ({"extra": float("nan")}, "NaN"), ({"count": True}, "count is true or false"),
])
def test_a_sidecar_s_values_have_their_types(folder, changes, words):
    path, sidecar_path = folder / "typed.save", folder / "typed.save.json"
    save_pairs(path, stored([GOOD]), {"precision": "fp32", "quantization": None, "unquantized_blocks": [0], "later": "unknown"})
    good = json.loads(sidecar_path.read_text())
    assert load_pairs(path, VOCAB, 100)[1] == {"quantized_otherwise": {}} | good
    sidecar_path.write_text(json.dumps(good | changes))
    with pytest.raises(UserError) as caught:
        load_pairs(path, VOCAB, 100)
    assert str(caught.value).startswith(f"{sidecar_path}: ") and words in str(caught.value)


def test_a_name_that_is_not_utf8_is_recorded(folder):
    save_pairs(folder / "bytes.save", stored([GOOD]), {"base_model": "wörld\udcff.pth"})
    assert load_pairs(folder / "bytes.save", VOCAB, 100)[1]["base_model"] == "wörld\udcff.pth"


def test_a_sidecar_of_another_file_or_a_damaged_one_is_refused(folder):
    path, sidecar_path = folder / "pairs.save", folder / "pairs.save.json"
    save_pairs(path, stored([GOOD]), {})
    first = sidecar_path.read_text()
    save_pairs(path, stored([GOOD, GOOD]), {})
    load_pairs(path, VOCAB, 100)
    for text, words in ((first, "belongs to another pairs.save"), ("{", "not JSON"), ("[]", "it is a list"), ("\xff", "not JSON"),
                        (json.dumps({"count": 2}), "lacks sha256"), ("[" * 100_000, "nested more than")):
        sidecar_path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            load_pairs(path, VOCAB, 100)
        assert str(caught.value).startswith(str(sidecar_path))
    sidecar_path.unlink()
    assert load_pairs(path, VOCAB, 100)[1] is None


@contextmanager
def largest_file(size: int):
    """A limit on the size of files, in bytes, stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_both_files_as_they_were(folder):
    path = folder / "full.save"
    save_pairs(path, stored([GOOD]), {"seed": 1})
    with largest_file(4096), pytest.raises(UserError, match=r"full\.save: cannot be written"):  # the sidecar fits
        save_pairs(path, stored([Pair([1] * 9000, [2], [3], -1.0, -1.0)]), {"seed": 2})
    pairs, sidecar, _ = load_pairs(path, VOCAB, 100)
    assert pairs == [GOOD] and sidecar["seed"] == 1
    assert not list(folder.glob(".full*"))


def test_a_disk_that_is_full_for_the_sidecar_leaves_both_files_as_they_were(folder):
    path = folder / "crowded.save"
    save_pairs(path, stored([GOOD]), {"seed": 1})
    with largest_file(path.stat().st_size + 500), pytest.raises(UserError, match=r"crowded\.save\.json: cannot be written"):
        save_pairs(path, stored([GOOD._replace(chosen_base_prob=-3.0)]), {"base_model": "x" * (path.stat().st_size + 500)})
    pairs, sidecar, _ = load_pairs(path, VOCAB, 100)
    assert pairs == [GOOD] and sidecar["seed"] == 1


@pytest.mark.parametrize("content", [b'{"my": "dataset"}', b"\xff", b"", None])
def test_a_sidecar_takes_no_other_file_s_place(folder, content):
    path, sidecar = folder / "taken.save", folder / "taken.save.json"
    path.unlink(missing_ok=True)
    sidecar.write_bytes(content) if content is not None else sidecar.mkdir()
    with pytest.raises(UserError, match=r"taken\.save\.json: is no sidecar and would be overwritten"):
        check_sidecar_place(path)
    sidecar.unlink() if content is not None else sidecar.rmdir()
    check_sidecar_place(path)
    save_pairs(path, stored([GOOD]), {})
    check_sidecar_place(path)
    path.unlink()  # what a job of this kind left stands in nobody's way
    check_sidecar_place(path)
    path.touch()  # and what belongs to an output that is written anew goes with it
    sidecar.write_text("{}")
    check_sidecar_place(path)
    sidecar.unlink()


def test_check_sidecar_says_what_differs():
    sidecar = {"base_fingerprint": "abc", "precision": "fp32", "quantization": None, "max_len": 512}
    assert check_sidecar(sidecar, dict(sidecar)) == []
    assert check_sidecar(sidecar, sidecar | {"precision": "bf16", "quantization": "nf4", "version": "x070"}) == [
        "precision: fp32 for the references, bf16 here",
        "quantization: none for the references, nf4 here",
        "version: not recorded for the references, x070 here"]
