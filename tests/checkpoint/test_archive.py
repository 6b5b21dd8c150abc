"""What a file of torch.save holds, told without PyTorch, against PyTorch; and files that lie about what they hold."""

import errno
import io
import resource
import struct
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.checkpoint.archive import Described, read_content
from src.checkpoint.io import load_checkpoint, load_safetensors, save_safetensors
from src.checkpoint.pickled import BadPickle
from src.errors import UserError
from src.preference.entries import Pair
from src.preference.pairs import load_pairs
from tests import hostile

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool, torch.complex64]
NEW_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint16, torch.uint32, torch.uint64]


def content(data: bytes):
    return read_content(io.BytesIO(data), data)


def named(tensor):
    """With attributes of its own, as many libraries leave them on."""
    tensor.label, tensor.known = "first", {"a": [1, 2]}
    return tensor


@pytest.mark.parametrize("old", [False, True])
def test_tensors_are_described_as_torch_loads_them(old):
    draw = torch.arange(60.0).view(3, 4, 5)
    tensors = {str(dtype): draw.to(dtype) for dtype in DTYPES + ([] if old else NEW_DTYPES)}
    tensors |= {"known": named(draw.clone()), "trains, known": named(torch.nn.Parameter(draw)),
                "buffer": torch.nn.Buffer(draw.clone()),
                "turned": draw.permute(2, 0, 1), "part": draw[1:, 2], "one": draw[1, 2, 3], "none": draw[:0], "same": draw,
                "a tensor in four": torch.eye(4).diagonal(), "trains": torch.nn.Parameter(draw)}
    data = hostile.saved(tensors, _use_new_zipfile_serialization=not old)
    found = content(data)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert found.value == {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()}
    assert len(found.tensors) == len(tensors) - 1  # one is there under two names


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("tensor", [
    lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse_csr(), lambda: torch.zeros(3, device="meta"),
    lambda: torch.zeros(3, dtype=torch.complex64).conj(), lambda: torch.zeros(3, dtype=torch.complex64).conj().imag,
    lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
], ids=["sparse", "csr", "meta", "conj", "neg", "quantized", "nested"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_forms_have_no_type(tensor, old):
    assert content(hostile.saved([tensor()], _use_new_zipfile_serialization=not old)).value == [Described(None, ())]


# Where PyTorch would refuse the file too, if later and at a price.
REASONS = {
    "compressed": "is compressed", "compressed, a list of numbers": "is compressed", "an entry within another": "within another",
    "an entry twice": "there twice", "an entry longer than the file": "after the file's end",
    "the old format claims 4 TB": "not all there", "a bytearray of 64 GB": "bytearray", "two tables": "without PyTorch's data",
    "numbers as keys that all have one hash": "keys are no names", "one value that claims 2.5 TB": "contiguous()",
    "tuples within tuples as a key": "keys are no names", "an offset behind the data": "has 16 bytes of data",
}


@pytest.mark.parametrize("name", hostile.torch_files())
def test_a_file_that_lies_is_refused_at_once_and_in_little_memory(tmp_path, name):
    data = hostile.torch_files()[name]
    assert len(data) < 1 << 20
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for ending, load in ((".pth", load_checkpoint), (".save", lambda path: load_pairs(path, 65536, 512))):
        path = tmp_path / f"hostile{ending}"
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 300
        assert ("code" in name) == ("posix.system" in message) and REASONS.get(name, "") in message
    assert time.process_time() - started < 3 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(("value", "options", "words"), [
    (torch.zeros(1, 3).expand(4, 3), {}, "contiguous()"), (torch.zeros(3), {"pickle_protocol": 4}, "pickle protocol 4"),
    (torch.zeros(3), {"pickle_protocol": 5}, "pickle protocol 5"),
    (torch.zeros(3), {"pickle_protocol": 4, "_use_new_zipfile_serialization": False}, "pickle protocol 4"),
])
def test_an_honest_file_that_is_not_supported_is_not_called_damaged(tmp_path, value, options, words):
    for ending, load, held in ((".pth", load_checkpoint, {"a": value}),
                               (".save", lambda path: load_pairs(path, 65536, 512), [([1], value, [2], -1.0, -1.0)])):
        path = tmp_path / f"file{ending}"
        path.write_bytes(hostile.saved(held, **options))
        with pytest.raises(UserError) as caught:
            load(path)
        assert words in str(caught.value) and "damaged" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pairs_without_tensors_may_have_any_protocol(tmp_path, protocol):
    path = tmp_path / "pairs.save"
    path.write_bytes(hostile.saved([([1], [2], [3], -1.0, -2.0)], pickle_protocol=protocol))
    assert load_pairs(path, 256, 512)[0] == [Pair([1], [2], [3], -1.0, -2.0)]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
@pytest.mark.parametrize(("ending", "load", "inside"), [
    (".pth", load_checkpoint, "src.checkpoint.io.torch.load"), (".safetensors", load_checkpoint, "src.checkpoint.io.safe_open"),
    (".save", lambda path: load_pairs(path, 256, 512), "src.preference.reading.torch.load"),
])
def test_memory_that_runs_out_is_no_damage(tmp_path, monkeypatch, ending, load, inside, error):
    path = good(tmp_path, ending)
    monkeypatch.setattr(inside, raising(error))
    with pytest.raises(type(error)) as caught:
        load(path)
    assert caught.value is error


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch, ending):
    path = good(tmp_path, ending)
    inside = "src.checkpoint.io.torch.load" if ending == ".pth" else "src.checkpoint.io.safe_open"
    monkeypatch.setattr(inside, raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(UserError, match="Too many open files") as caught:
        load_checkpoint(path)
    assert "damaged" not in str(caught.value)


def good(folder, ending):
    path = folder / f"good{ending}"
    if ending == ".safetensors":
        save_safetensors({"a": torch.zeros(2)}, path, {})
    else:
        pairs = [([1], torch.tensor([2]), [3], -1.0, -2.0)]
        path.write_bytes(hostile.saved({"a": torch.zeros(2)} if ending == ".pth" else pairs))
    load_safetensors(path) if ending == ".safetensors" else content(path.read_bytes())
    return path


def raising(error):
    def fails(*_, **__):
        raise error
    return fails


@pytest.mark.parametrize("name", hostile.safetensors_files())
def test_a_safetensors_file_that_lies_is_refused(tmp_path, name):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(hostile.safetensors_files()[name])
    with pytest.raises(UserError) as caught:
        load_safetensors(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@given(data=st.data(), old=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_refused_or_describe_what_torch_loads(data, old):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": [1, 2, 3], "c": torch.zeros(2).half()}
    whole = bytearray(hostile.saved(tensors, _use_new_zipfile_serialization=not old))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(whole) - 4))
        whole[place:place + 4] = data.draw(st.sampled_from([b"\xff" * 4, bytes(4), struct.pack("<I", 2**31)])
                                           | st.binary(min_size=4, max_size=4))
    try:
        found = content(bytes(whole))
    except BadPickle as error:
        assert len(str(error)) < 300
        return
    try:
        loaded = torch.load(io.BytesIO(bytes(whole)), weights_only=True)
    except Exception:
        return  # of a name, a version or a checksum that is not looked at here
    if isinstance(found.value, dict) and isinstance(loaded, dict):
        for name, value in found.value.items():
            if isinstance(value, Described) and value.dtype is not None:
                assert (value.dtype, value.shape) == (loaded[name].dtype, tuple(loaded[name].shape))
