"""The `.save` file: round trips, files of older tools, and files that should be refused."""

import io
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UserError
from src.preference.entries import Pair
from src.preference.pairs import has_references, load_pairs, save_pairs
from tests import hostile
from tests.stored_pairs import stored

VOCAB = 65536
GOOD = ([1, 2], [3], [4, 5], -1.5, -2.5)

token_lists = st.lists(st.integers(0, VOCAB - 1), max_size=5)
answers = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5)
floats = st.floats(-1e7, 0.0)
pair_parts = st.tuples(token_lists, answers, answers, floats, floats)
pair_lists = st.lists(pair_parts.map(lambda parts: Pair(*parts)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("save")


def old(folder, content):
    """A file as an older tool leaves it: no sidecar."""
    path = folder / "old.save"
    torch.save(content, path)
    return path


def refusal(path, vocab_size=VOCAB, max_len=100) -> str:
    with pytest.raises(UserError) as caught:
        load_pairs(path, vocab_size, max_len)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@given(pairs=pair_lists)
def test_round_trip(folder, pairs):
    path = folder / "new.save"
    save_pairs(path, stored(pairs), {"tokenizer": "wörld"})
    loaded, sidecar, left_out = load_pairs(path, VOCAB, 100)
    assert loaded == pairs and left_out == {"too_long": 0, "empty_answer": 0}
    assert all(type(value) is float for pair in loaded for value in pair[3:5])
    assert sidecar["tokenizer"] == "wörld" and sidecar["count"] == len(pairs)
    assert torch.load(path, weights_only=True) == [pair[:5] for pair in pairs]


def test_the_same_pairs_give_the_same_bytes(folder):
    save_pairs(folder / "a.save", stored([Pair(*GOOD)] * 2), {})
    save_pairs(folder / "b.save", stored([Pair(*GOOD)] * 2), {})
    assert (folder / "a.save").read_bytes() == (folder / "b.save").read_bytes()
    assert (folder / "a.save.json").read_text() == (folder / "b.save.json").read_text()


def test_older_files_with_tensors_tuples_and_ints(folder):
    content = [
        (torch.tensor([1, 2]), torch.tensor([3], dtype=torch.int32), (4, 5), torch.tensor(-1.5), torch.tensor([-2.5])),
        [[1, 2], [3], [4, 5], -2, torch.tensor(-2.5, dtype=torch.bfloat16)],
    ]
    pairs, sidecar, _ = load_pairs(old(folder, content), VOCAB, 100)
    assert pairs == [Pair(*GOOD), Pair(*GOOD[:3], -2.0, -2.5)] and sidecar is None
    assert all(type(tokens) is list and set(map(type, tokens)) == {int} for pair in pairs for tokens in pair[:3])
    assert all(type(value) is float for pair in pairs for value in pair[3:5])


@pytest.mark.parametrize("how", [{"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}])
def test_the_format_before_zip_and_other_pickles_are_read(folder, how):
    path = folder / "legacy.save"
    for content in ([GOOD], [(torch.tensor([1, 2]), *GOOD[1:3], torch.tensor(-1.5), -2.5)]):
        torch.save(content, path, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch has some for such files, which a user can do nothing about
            assert load_pairs(path, VOCAB, 100)[0] == [Pair(*GOOD)]


def test_tensors_that_were_saved_on_a_gpu_are_read_without_one(folder):
    pickle, path = io.BytesIO(), folder / "of_a_gpu.save"
    torch.save([(torch.tensor([1, 2]), *GOOD[1:])], pickle)
    with zipfile.ZipFile(pickle) as cpu, zipfile.ZipFile(path, "w") as gpu:
        for name in cpu.namelist():
            # A short text in a pickle: X, its length in four bytes, its letters.
            gpu.writestr(name, cpu.read(name).replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
    assert b"cuda:0" in path.read_bytes()
    assert load_pairs(path, VOCAB, 100)[0] == [Pair(*GOOD)]


def test_tuples_that_pairs_share_become_one_list(folder):
    shared = (1, 2)
    pairs, _, _ = load_pairs(old(folder, [(shared, *GOOD[1:]), (shared, [5], *GOOD[2:])]), VOCAB, 100)
    assert pairs[0][0] == [1, 2] and pairs.numbered(0).prompt == pairs.numbered(1).prompt


def test_long_pairs_and_empty_answers_are_left_out_whole(folder):
    content = [([1] * 7, [2] * 3, [3], -1.0, -1.0), ([1] * 7, [2], [3] * 4, -1.0, -1.0), ([1], [], [3], 0.0, -1.0),
               ([1], [2], [], -1.0, 0.0), ([], [2] * 10, [3], -1.0, -1.0), ([1], [2] * 10, [3], -1.0, -1.0),
               ([1] * 11, [2], [3], -1.0, -1.0)]
    pairs, _, left_out = load_pairs(old(folder, content), VOCAB, 10)
    assert pairs == [Pair(*content[0]), Pair(*content[4])] and left_out == {"too_long": 3, "empty_answer": 2}
    message = refusal(old(folder, content[1:4]), max_len=10)
    assert "1 are longer than 10 tokens, 2 have an empty answer" in message and message.endswith("; see --rlhf_max_corpus_len")
    # A longer limit would not help here.
    assert refusal(old(folder, content[2:4]), max_len=10).endswith(
        "2 have an empty answer (single answers, thumbs up or down, train with --loss kto)")


def test_a_file_of_texts_is_told_how_to_become_a_save(folder):
    for data in (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', b"prompt,chosen,reject\na,b,c\n", b"PAR1\x15\0", b""):
        (folder / "texts.jsonl").write_bytes(data)
        assert "texts.jsonl: is not a .save file; rlhf_dpo_generate_save.py makes one of" in refusal(folder / "texts.jsonl")


def test_what_a_pair_has_more_is_in_a_sixth_entry_and_what_it_has_not_is_nowhere(folder):
    path, kl = folder / "more.save", [9, 8]
    pairs = [Pair(*GOOD), Pair([1], [2, 3], [], -1.0, 0.0, 1, 0, kl, -4.5), Pair([1], [], [2, 3, 4], 0.0, -2.0, reject_from=2),
             Pair([1], [], [2], 0.0, -1.0, kl=kl)]
    save_pairs(path, stored(pairs), {})
    assert torch.load(path, weights_only=True) == [
        GOOD, ([1], [2, 3], [], -1.0, 0.0, {"chosen_from": 1, "kl": [9, 8], "kl_base_prob": -4.5}),
        ([1], [], [2, 3, 4], 0.0, -2.0, {"reject_from": 2}), ([1], [], [2], 0.0, -1.0, {"kl": [9, 8]})]
    loaded, _, left_out = load_pairs(path, VOCAB, 100, thumbs=True)
    assert loaded == pairs and left_out == {"too_long": 0, "empty_answer": 0}
    assert loaded.numbered(1).kl == loaded.numbered(3).kl  # one list in the file, one here
    loaded, _, left_out = load_pairs(path, VOCAB, 100)
    assert loaded == pairs[:1] and left_out == {"too_long": 0, "empty_answer": 3}


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 2000, 2500])
def test_the_pickle_is_that_of_the_pickle_module(folder, count):
    generator = np.random.default_rng(count)
    lists = [generator.integers(0, VOCAB, length).tolist() for length in (0, 1, 3, 40, 300, 1000, 1001, 2300)]
    lists += [[200, 255, 256, 65535], [7]]
    entries, pairs = [], []
    for at in range(count):
        prompt, chosen, reject, kl = (lists[number] for number in generator.integers(1, len(lists), 4))
        more = [{}, {}, {"chosen_from": 300}, {"kl": kl, "kl_base_prob": -0.5 * at - 1},
                {"reject_from": 1, "kl": kl, "kl_from": 7},
                {"chosen_from": 70_000, "reject_from": 2, "kl": kl, "kl_base_prob": -3.0, "kl_from": 256}][at % 6]
        pairs.append(Pair(prompt, chosen, reject, -1.5 - at, 0.0, **more))
        entries.append((prompt, chosen, reject, -1.5 - at, 0.0, *([more] if more else [])))
    save_pairs(folder / "plain.save", stored(pairs), {})
    with zipfile.ZipFile(folder / "plain.save") as archive:
        assert archive.read("archive/data.pkl") == pickle.dumps(entries, 2)
    assert torch.load(folder / "plain.save", weights_only=True) == entries


def test_what_the_file_refers_to_again_is_read_again(folder):
    """Pairs, lists and dicts that are several times in a list of thousands, as one object each."""
    shared, more = [1, 2, 3], {"chosen_from": 1, "kl": [4, 5], "kl_base_prob": -2.0}
    whole, other = (shared, [6, 7], [8], -1.0, -2.0), (shared, [6, 7], [], -1.0, 0.0, more)
    content = [whole, other, *(([at], shared, shared, -1.0, -at - 1.0) for at in range(2500)), whole, other,
               ([9], [6, 7], [], -3.0, 0.0, more), [[9], more["kl"], (1, 2), -3, -4], whole]
    pairs, _, _ = load_pairs(old(folder, content), VOCAB, 100, thumbs=True)
    assert pairs == [Pair(*map(list, entry[:3]), *map(float, entry[3:5]), **(entry[5] if len(entry) > 5 else {}))
                     for entry in content]
    assert len({pairs.numbered(at).prompt for at in (0, 1, 2502, 2503)} | {pairs.numbered(2).chosen}) == 1
    assert pairs.numbered(1).kl == pairs.numbered(2504).kl == pairs.numbered(2505).chosen
    for wrong, words in ((shared, "a list of a pair before it again, where a pair"), (more, "a dict of a pair before it again"),
                         ((whole, *whole[1:]), "the whole of a pair before it again, where a list of token ids"),
                         ((*whole, shared), "a list of a pair before it again, where a dict"),
                         ((*whole[:3], shared, -1.0), "a list of a pair before it again, where a number"),
                         ((*whole, {"kl": [1], "kl_base_prob": whole}), "the whole of a pair before it again, where a number")):
        assert f"pair 2506 has {words}" in refusal(old(folder, [*content[:2505], wrong]))


def test_an_endlessly_repeated_list_is_stored_once_whatever_its_number(folder):
    """A list with a number that no pickle gives it, which items refer to, each handed on by itself."""
    tokens = b"]%b(" + hostile.integer(7) * 1000 + b"e"
    item = b"(h\x07h\x07h\x07G" + struct.pack(">d", -1.0) + b"G" + struct.pack(">d", -1.0) + b"ta"
    for gap in (b"", b"q\x00", b"q\x09"):
        first = b"(" + tokens % b"q\x07" + b"h\x07h\x07G" + struct.pack(">d", -1.0) + b"G" + struct.pack(">d", -1.0) + b"ta"
        path = folder / "numbers.save"
        torch.save([], path)
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(folder / "numbered.save", "w") as made:
            for name in archive.namelist():
                made.writestr(name, archive.read(name) if not name.endswith("data.pkl") else
                              hostile.pickled(b"]" + gap + first + item * 50))
        pairs, _, _ = load_pairs(folder / "numbered.save", VOCAB, 3000)
        assert len(pairs) == 51 and len(pairs.lists) == 2


def test_a_list_of_pairs_that_holds_itself_is_refused(folder):
    content = [GOOD]
    content.append((content, *GOOD[1:]))
    assert "it has a list that holds itself" in refusal(old(folder, content))


def test_a_tensor_after_thousands_of_plain_pairs_is_read(folder):
    content = [([1], [2], [3], -1.0, -at - 1.0) for at in range(2500)]
    pairs, _, _ = load_pairs(old(folder, [*content, (torch.tensor([4]), [2], [3], -1.0, -1.0)]), VOCAB, 100)
    assert pairs == [Pair(*entry) for entry in content] + [Pair([4], [2], [3], -1.0, -1.0)]


def test_a_thumb_without_any_answer_and_one_whose_mismatched_answer_is_too_long_are_left_out(folder):
    content = [([1], [], [], 0.0, 0.0), ([1] * 5, [2], [], -1.0, 0.0, {"kl": [3] * 6, "kl_base_prob": -1.0}),
               ([1] * 4, [2], [], -1.0, 0.0, {"kl": torch.tensor([3] * 6), "kl_base_prob": torch.tensor(-1.0)})]
    pairs, _, left_out = load_pairs(old(folder, content), VOCAB, 10, thumbs=True)
    assert pairs == [Pair([1] * 4, [2], [], -1.0, 0.0, kl=[3] * 6, kl_base_prob=-1.0)]
    assert left_out == {"too_long": 1, "empty_answer": 1}
    message = refusal(old(folder, content), max_len=10)
    assert "3 have an empty answer (single answers, thumbs up or down, train with --loss kto)" in message


def sixth(**more):
    return [GOOD] * 11 + [(*GOOD, more)]


def broken(place, value):
    return [GOOD] * 11 + [(*GOOD[:place], value, *GOOD[place + 1:])]


@pytest.mark.parametrize("content, words", [
    ([], "holds no pairs"),
    ({"emb.weight": torch.zeros(2)}, "holds a dict where a list of pairs is expected"),
    ([GOOD, GOOD[:4]], "pair 2 is 4 entries where 5 are expected"),
    ([GOOD, 7], "pair 2 is a int where 5 are expected"),
    (broken(1, [3, 70000]), f"token id 70000 in pair 12 is beyond the vocabulary of {VOCAB}"),
    (broken(2, [VOCAB]), f"token id {VOCAB} in pair 12 is beyond the vocabulary of {VOCAB}"),
    (broken(0, torch.tensor([70000])), f"token id 70000 in pair 12 is beyond the vocabulary of {VOCAB}"),
    (broken(0, [1, -1]), "token id -1 in pair 12 is negative"),
    (broken(0, [1, 2.0]), "the prompt of pair 12 holds a float where token ids are expected"),
    (broken(1, [True]), "the chosen of pair 12 holds a bool"),
    (broken(2, ["a"]), "the reject of pair 12 holds a str"),
    (broken(2, "text"), "the reject of pair 12 is a str"),
    (broken(0, torch.zeros(1, 2, dtype=torch.int64)), "the prompt of pair 12 is a tensor of shape (1, 2)"),
    (broken(0, torch.zeros(2)), "the prompt of pair 12 is a tensor of shape (2,) and torch.float32"),
    (broken(0, torch.zeros(2, dtype=torch.int64, device="meta")), "the prompt of pair 12 is a tensor"),
    (broken(0, torch.zeros(2, dtype=torch.int64).to_sparse()), "the prompt of pair 12 is a tensor"),
    ([(torch.tensor([1]), *GOOD[1:])] * 11 + [(torch.eye(2).to_sparse(), *GOOD[1:])], "the prompt of pair 12 is a tensor in a"),
    (broken(4, torch.zeros(1, device="meta")), "the reject_base_prob of pair 12 is a tensor in a form"),
    ([GOOD, [torch.zeros(1, device="meta")]], "something in it is a tensor in a form"),
    (torch.eye(2).to_sparse(), "something in it is a tensor in a form"),
    (broken(3, float("nan")), "chosen_base_prob of pair 12 is not a finite number"),
    (broken(4, torch.tensor(float("-inf"))), "reject_base_prob of pair 12 is not a finite number"),
    (broken(4, 10 ** 400), "reject_base_prob of pair 12 is not a finite number"),
    (broken(4, -1e308), "reject_base_prob of pair 12 is not a finite number of float32"),
    ([(*GOOD[:3], 1e39, 1e39)], "chosen_base_prob of pair 1 is not a finite number of float32"),
    (broken(3, -1e30), "chosen_base_prob of pair 12 is -1e+30, which no answer's log-probability can be"),
    (broken(3, -2 ** 24), "chosen_base_prob of pair 12 is -1.67772e+07, which no answer's"),
    (broken(3, torch.tensor(-1e30)), "chosen_base_prob of pair 12 is -1e+30, which no"),
    (broken(4, 0.5), "reject_base_prob of pair 12 is 0.5, which no answer's log-probability can be (at most 0"),
    ([(*GOOD[:3], 0.5, 0.5), (*GOOD[:3], 0.5, -2.0)], "chosen_base_prob of pair 1 is 0.5, which no"),
    ([(*GOOD[:3], 0.5, -2.0), (*GOOD[:3], 0.25, 0.25)], "chosen_base_prob of pair 1 is 0.5, which no"),
    (broken(1, [10 ** 600]), "token id of 1994 bits in pair 12 is beyond"),
    (broken(3, None), "chosen_base_prob of pair 12 is a NoneType"),
    (broken(3, True), "chosen_base_prob of pair 12 is a bool"),
    (broken(3, torch.zeros(2)), "chosen_base_prob of pair 12 is a tensor of shape (2,)"),
    ([(*GOOD, {}, 1)], "pair 1 is 7 entries where 5 are expected"),
    ([(*GOOD, [1])], "the sixth entry of pair 1 is a list where a dict is expected"),
    (sixth(chosn_from=1), "the sixth entry of pair 12 has the unknown name 'chosn_from'; known are chosen_from, reject_from, kl"),
    ([(*GOOD, {7: 1})], "the sixth entry of pair 1 has the unknown name a int; known"),
    (sixth(chosen_from=1), "chosen_from of pair 12 is 1, which is not within the 1 tokens of its chosen"),
    (sixth(reject_from=-1), "reject_from of pair 12 is -1, which is not within the 2 tokens of its reject"),
    (sixth(reject_from=10 ** 600), "reject_from of pair 12 is of 1994 bits, which is not within"),
    (sixth(reject_from=1.0), "reject_from of pair 12 is a float where a whole number is expected"),
    (sixth(reject_from=True), "reject_from of pair 12 is a bool where"),
    (sixth(chosen_from=None), "chosen_from of pair 12 is a NoneType"),
    ([([1], [], [2], 0.0, -1.0, {"chosen_from": 1})], "chosen_from of pair 1 is 1, which is not within the 0 tokens"),
    (sixth(kl=[VOCAB]), f"token id {VOCAB} in pair 12 is beyond the vocabulary"), (sixth(kl="ab"), "the kl of pair 12 is a str"),
    (sixth(kl=[1.5]), "the kl of pair 12 holds a float"),
    (sixth(kl=torch.eye(2).to_sparse()), "the kl of pair 12 is a tensor in a form"),
    (sixth(kl_base_prob=-1.0), "pair 12 has a kl_base_prob and no kl that it belongs to"),
    (sixth(kl=[1], kl_base_prob=0.5), "kl_base_prob of pair 12 is 0.5, which no answer's log-probability can be"),
    (sixth(kl=[1], kl_base_prob=float("nan")), "kl_base_prob of pair 12 is not a finite number"),
    (sixth(kl=[1], kl_base_prob="x"), "kl_base_prob of pair 12 is a str where a number is expected"),
])
def test_faults_name_the_pair(folder, content, words):
    assert words in refusal(old(folder, content))


@pytest.mark.parametrize(("references", "there"), [
    ([(0.5, 0.5)] * 3, False), ([(0.0, 0.0)] * 3, False), ([(0.5, 0.0), (1e30, 0.5)], False), ([(0.0, -1.0), (0.0, 0.0)], True),
    ([(-1.0, 9e-4), (-16777215.0, -0.0)], True),
])
def test_references_are_there_where_one_is_below_zero(folder, references, there):
    pairs = load_pairs(old(folder, [(*GOOD[:3], *values) for values in references]), VOCAB, 100)[0]
    assert has_references(pairs, None) == there
    assert not has_references(pairs, {"references": False})
    # Sidecars did not always say it.
    assert has_references(pairs, {"references": True}) == has_references(pairs, {}) == there


def test_numpy_values_are_refused_by_name(folder):
    for content in ([(*GOOD[:3], np.float64(-1.0), -1.0)], [(np.array([1]), *GOOD[1:])]):
        message = refusal(old(folder, content))
        assert "numpy" in message and "no numpy values and no code" in message


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_does_not_run(folder, zipped):
    mark = folder / f"ran_{zipped}"
    path = folder / "evil.save"
    torch.save([Payload(mark)], path, _use_new_zipfile_serialization=zipped)
    assert "refused, since it names posix.mkdir" in refusal(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the payload is a live one
    assert mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(data=st.data())
def test_damaged_bytes_are_refused_in_one_line(folder, data):
    buffer = io.BytesIO()
    torch.save([GOOD, GOOD], buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
    whole = bytearray(buffer.getvalue())
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole = whole[:place]
    else:
        whole[place] = data.draw(st.integers(0, 255))
    path = folder / "damaged.save"
    path.write_bytes(whole)
    try:
        load_pairs(path, VOCAB, 100)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("where", ["read_content", "torch.load"])
def test_memory_that_ends_is_no_fault_of_the_file(folder, monkeypatch, where):
    def full(*arguments, **options):
        raise MemoryError

    path = old(folder, [(torch.tensor([1, 2]), *GOOD[1:])])
    monkeypatch.setattr(f"src.preference.reading.{where}", full)
    with pytest.raises(MemoryError):
        load_pairs(path, VOCAB, 100)


def test_many_rounds_over_few_rows_share_their_tokens(folder):
    rows = [([1 + i] * 50, [2] * 50, [3] * 50) for i in range(200)]
    path = folder / "many.save"
    save_pairs(path, stored([Pair(*rows[i % 200], -1.0 - i, -2.0) for i in range(20_000)]), {})
    pairs, _, _ = load_pairs(path, VOCAB, 100)
    assert len(pairs) == 20_000 and pairs[-1] == Pair([200] * 50, [2] * 50, [3] * 50, -20_000.0, -2.0)
    assert len(set(pairs.tokens.columns()[0])) == 200 and len(pairs.lists) == 601  # with the empty list
    # Two floats and three references are about 40 bytes a pair; the tokens written out would be 300 at least.
    assert path.stat().st_size < 20_000 * 60
