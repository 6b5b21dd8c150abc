"""The reader of pickles as data, against the pickle module, and against pickles made to do something else."""

import pickle
import tracemalloc
from collections import OrderedDict
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.checkpoint.pickled import BadPickle, Kept, Named, NamesCode, Reader, Stored
from tests import hostile

leaves = (st.none() | st.booleans() | st.integers(-2**300, 2**300) | st.floats(allow_nan=False)
          | st.text(st.characters(codec=None, exclude_categories=()), max_size=30))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple)
                      | st.dictionaries(st.text(max_size=5) | st.integers(0, 2**31 - 1), inner, max_size=5), max_leaves=30)


def reader(data, known=(), describe=lambda name, arguments: (name, arguments)) -> Reader:
    return Reader(data, frozenset(known), describe)


@given(value=values, protocol=st.sampled_from([2, 4]))
def test_plain_data_come_back_as_the_pickle_module_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    found = reader(data).read()
    assert found == value and pickle.dumps(found, protocol) == pickle.dumps(pickle.loads(data), protocol)


def test_values_stand_one_behind_another():
    data = b"".join(pickle.dumps(value, 2) for value in (1, [2], "three"))
    found = reader(data)
    assert [found.read() for _ in range(3)] == [1, [2], "three"] and found.at == len(data)


def test_a_list_that_many_share_is_one():
    row = list(range(1000))
    found = reader(pickle.dumps([row] * 1000, 2)).read()
    assert found == [row] * 1000 and len({id(inner) for inner in found}) == 1


class Receiver:
    """Numbers each list within the items that it gets, and the items."""

    def __init__(self):
        self.items, self.given, self.places = [], [], []

    def __call__(self, items, at):
        numbers = {}
        for item in items:
            self.items.append(item)
            for value in (item, *(item if isinstance(item, list) else [])):
                if isinstance(value, list) and id(value) not in numbers:
                    numbers[id(value)] = len(self.given)
                    self.given.append(value)
        self.places.append(at)
        return numbers

    def whole(self):
        """All items, with what was referred to again in its place."""
        def again(value):
            value = self.given[value.number] if isinstance(value, Kept) else value
            return [again(inner) for inner in value] if isinstance(value, list) else value

        return [again(item) for item in self.items]


@given(pool=st.lists(values, max_size=6), protocol=st.sampled_from([2, 4]), times=st.sampled_from([1, 150, 600]))
def test_items_are_handed_on_and_recognized_when_they_come_again(pool, protocol, times):
    inner, late = [3], [5]
    # Lists that are there for the first time after others were handed on, too.
    value = [*([*pool, [1, 2], [inner, "a"], [inner]] * times), *([at, late] for at in range(times)), [inner, late]]
    dumped, receiver = pickle.dumps(value, protocol) + b"after", Receiver()
    found = reader(dumped)
    assert found.read(receiver) == [] and receiver.whole() == value
    assert found.at == len(dumped) - 5 and receiver.places == sorted(receiver.places)
    assert len(receiver.places) == -(-len(value) // 1000)
    assert any(isinstance(item, Kept) for item in receiver.items) == (times > 600 or (len(pool) + 3) * times > 1000)
    assert receiver.given.count(inner) == receiver.given.count(late) == 1


def test_only_the_outermost_list_is_handed_on():
    for value in ({"a": [1, 2]}, ("a", [1], [2], [3], [4]), 7, [[1, 2]] * 3):
        receiver = Receiver()
        found = reader(pickle.dumps(value, 2)).read(receiver)
        assert (found, receiver.whole()) == ((value, []) if not isinstance(value, list) else ([], value))


def test_what_was_handed_on_does_not_grow():
    receiver = Receiver()
    with pytest.raises(BadPickle):
        reader(hostile.pickled(b"]q\x00(]q\x01e(h\x01K\x01ae")).read(receiver)
    assert receiver.whole() == [[]]


def test_memory_of_what_was_handed_on_is_given_back():
    data = pickle.dumps([[at, 70_000, 70_001, 70_002] for at in range(100_000)], 2)
    tracemalloc.start()
    try:
        reader(data).read(lambda items, at: {id(item): 0 for item in items})
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20  # 8 bytes an item, and a thousand items
    finally:
        tracemalloc.stop()


@given(value=values, part=st.floats(0, 1, exclude_max=True))
def test_a_pickle_that_is_cut_short_is_none(value, part):
    data = pickle.dumps(value, 2)
    with pytest.raises(BadPickle):
        reader(data[:int(part * len(data))]).read()


@pytest.mark.filterwarnings("ignore")
@given(data=st.binary(max_size=200))
def test_any_bytes_are_data_or_no_pickle(data):
    with suppress(BadPickle):
        reader(data).read()


class Called:
    def __reduce__(self):
        raise AssertionError


@pytest.mark.parametrize(("value", "name"), [
    (print, "print"), (Called, f"{__name__}.Called"), (OrderedDict(a=1), "collections.OrderedDict"), (b"bytes", "_codecs.encode"),
    ({1}, "set"), (1j, "complex"), (bytearray(3), "bytearray"),
])
@pytest.mark.parametrize("protocol", [2])
def test_every_name_that_is_not_known_is_refused(value, name, protocol):
    with pytest.raises(NamesCode) as caught:
        reader(pickle.dumps({"a": value}, protocol)).read()
    assert caught.value.name == name


def test_what_is_called_or_stored_elsewhere_is_described():
    data = hostile.pickled(b"(cmodule\nname\n" + hostile.integers((1, 2)) + b"R" + hostile.text("here") + b"Qcmodule\nname\nt")
    assert reader(data, ["module.name"]).read() == (("module.name", (1, 2)), Stored("here"), Named("module.name"))


@pytest.mark.parametrize("instructions", [
    b"c" + b"a" * 10_000, b"cmodule\n", b"])R", b"}])R", b"cm\nn\n]R", b"(", b"t", b"e", b"a", b"]e", b"(]a", b"K\x01\x85\x86",
    b"K\x01b", b"h\x00", b"j\x00\x00\x00\x00", b"q", b"}K\x01s", b"})K\x01s", b"}NK\x01s", b"}(K\x01u", b"\x93",
    b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff",
    b"(K\x01", b"K\x01K\x01", b"0", b"2", b"1", b"\x81", b"o", b"i", b"I1\n", b"\x82\x01", b"\x97",
])
def test_instructions_that_make_no_value(instructions):
    with pytest.raises(BadPickle) as caught:
        reader(hostile.pickled(instructions), ["m.n"]).read()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_memory_grows_as_the_data_do():
    """Whatever refers to a list again and again makes none anew."""
    data = hostile.pickled(b"](]q\x00(" + hostile.integer(7) * 1000 + b"e" + b"h\x00" * 100_000 + b"e")
    tracemalloc.start()
    try:
        found = reader(data).read()
        assert len(found) == 100_001 and tracemalloc.get_traced_memory()[1] < 10 * len(data) + 2**20
    finally:
        tracemalloc.stop()
