"""Checkpoint files against torch's and safetensors' own readers and writers, and all that can be wrong with one."""

import hashlib
import io
import os
import pickle
import resource
import signal
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from src.checkpoint.io import (
    fingerprint,
    fingerprint_if_finite,
    load_checkpoint,
    load_safetensors,
    save_checkpoint,
    save_safetensors,
    write_archive,
)
from src.errors import Stopped, UserError
from tests import hostile

ENDINGS = [".pth", ".safetensors"]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(6, 5, generator=generator)
    return {"z.weight": draw, "a": draw[0].bfloat16(), "half": draw.half(), "wide": draw.double(), "one": draw[2, 3].clone(),
            "ids": torch.arange(7), "flags": draw > 0, "none": torch.zeros(0, 4), "fp8": draw.to(torch.float8_e4m3fn),
            "bytes": torch.arange(3, dtype=torch.uint8)}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        # Bits rather than values: a NaN or a negative zero has to come back as it is.
        assert bytes(found[name].contiguous().reshape(-1).view(torch.uint8)) == \
            bytes(tensor.contiguous().reshape(-1).view(torch.uint8)), name


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# Round trips


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_saved_comes_back_and_others_read_it(weights, tmp_path, ending):
    path = tmp_path / f"model{ending}"
    save_checkpoint(weights, path)
    assert_same(load_checkpoint(path), weights)
    assert_same(torch.load(path, weights_only=True) if ending == ".pth" else safetensors.torch.load_file(path), weights)
    assert os.listdir(tmp_path) == [path.name]


def test_files_written_by_others_are_read(weights, tmp_path):
    older = {name: tensor for name, tensor in weights.items() if name != "fp8"}  # the old format has no 8-bit floats
    for ending in (".pth", ".pt", ".bin", ".PTH"):
        torch.save(weights, tmp_path / f"zip{ending}")
        torch.save(older, tmp_path / f"legacy{ending}", _use_new_zipfile_serialization=False)
        assert_same(load_checkpoint(tmp_path / f"zip{ending}"), weights)
        assert_same(load_checkpoint(str(tmp_path / f"legacy{ending}")), older)
    safetensors.torch.save_file(weights, tmp_path / "theirs.safetensors")
    assert_same(load_checkpoint(tmp_path / "theirs.safetensors"), weights)


def test_parameters_come_back_as_plain_tensors(tmp_path):
    torch.save(torch.nn.Linear(3, 2).state_dict(keep_vars=True), tmp_path / "model.pth")
    assert not any(tensor.requires_grad for tensor in load_checkpoint(tmp_path / "model.pth").values())


def test_the_ending_pth_may_be_left_out(weights, tmp_path):
    save_checkpoint(weights, tmp_path / "RWKV-x070-0.1B-v2.8.pth")
    (tmp_path / "RWKV-x070-0.1B-v2.8").mkdir()
    assert_same(load_checkpoint(tmp_path / "RWKV-x070-0.1B-v2.8"), weights)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_loaded_tensor_is_mapped_and_changing_it_leaves_the_file_alone(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    save_checkpoint({"a": torch.ones(1000)}, path)
    loaded = load_checkpoint(path)
    assert path.name in Path("/proc/self/maps").read_text()
    loaded["a"].zero_()
    assert load_checkpoint(path)["a"].sum() == 1000


@pytest.mark.parametrize("ending", ENDINGS)
def test_views_are_saved_alone_and_transposed_ones_in_order(tmp_path, ending):
    large = torch.arange(1_000_000.0).reshape(1000, 1000)
    views = {"row": large[3], "corner": large[:2, :2], "turned": large[:3, :2].t()}
    save_checkpoint(views, tmp_path / f"model{ending}")
    assert (tmp_path / f"model{ending}").stat().st_size < 20_000
    assert_same(load_checkpoint(tmp_path / f"model{ending}"), views)


def test_tensors_that_share_memory_are_both_saved(tmp_path):
    shared = torch.arange(6.0)
    for ending in ENDINGS:
        save_checkpoint({"a": shared, "b": shared, "c": shared[1:4]}, tmp_path / f"model{ending}")
        assert_same(load_checkpoint(tmp_path / f"model{ending}"), {"a": shared, "b": shared, "c": shared[1:4]})


def test_metadata_travels_with_safetensors(weights, tmp_path):
    path = tmp_path / "adapter.safetensors"
    metadata = {"rank": "8", "note": "naïve \"quotes\" \n 你好"}
    save_safetensors(weights, path, metadata)
    found, found_metadata = load_safetensors(path)
    assert_same(found, weights)
    assert found_metadata == metadata
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    save_safetensors(weights, path, {})
    assert load_safetensors(path)[1] == {}


def test_every_tensor_in_safetensors_is_aligned_to_its_elements(weights, tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(weights, path, {"k": "v"})
    for name, tensor in load_safetensors(path)[0].items():
        assert tensor.data_ptr() % tensor.element_size() == 0, name


# What is refused


class RunsCode:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Custom:
    pass


@pytest.mark.parametrize("write", [
    lambda bad, path: torch.save({"a": bad}, path),
    lambda bad, path: torch.save({"a": bad}, path, _use_new_zipfile_serialization=False),
    lambda bad, path: path.write_bytes(pickle.dumps({"a": bad})),
    lambda bad, path: path.write_bytes(pickle.dumps(bad, protocol=0)),
    lambda bad, path: path.write_bytes(pickle.dumps(bad, protocol=2)),
], ids=["zip", "legacy", "pickle", "protocol 0", "protocol 2"])
def test_code_is_refused_and_never_run(tmp_path, write):
    marker, path = tmp_path / "marker", tmp_path / "model.pth"
    write(RunsCode(marker), path)
    assert "holds code" in refusal(path) and "not loaded" in refusal(path)
    assert not marker.exists()


def test_an_object_s_class_is_named(tmp_path):
    torch.save({"a": Custom()}, tmp_path / "model.pth")
    assert f"holds code ({__name__}.Custom)" in refusal(tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_code_and_refused_without_a_warning(tmp_path, recwarn):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "model.pt"))
    recwarn.clear()
    assert "TorchScript" in refusal(tmp_path / "model.pt")
    assert not recwarn.list


def test_missing_folder_empty_and_foreign_endings(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.pth")
    assert "is not a file" in refusal(tmp_path)
    for ending in (".pth", ".pt", ".bin"):
        (tmp_path / f"empty{ending}").touch()
        assert "is empty" in refusal(tmp_path / f"empty{ending}")
    (tmp_path / "empty.safetensors").touch()
    refusal(tmp_path / "empty.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "ends in none of .pth" in refusal(tmp_path / "model.gguf")


def test_a_file_cut_short_anywhere_is_refused(weights, tmp_path):
    torch.save(weights, tmp_path / "zip.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_checkpoint(weights, tmp_path / "model.safetensors")
    for whole in (tmp_path / "zip.pth", tmp_path / "legacy.pth", tmp_path / "model.safetensors"):
        data = whole.read_bytes()
        for part in range(1, 40):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(data[:len(data) * part // 40])
            # A legacy file may end within a class's name, which then reads as an unknown one.
            assert "damaged" in refusal(cut) or whole.stem == "legacy"


def test_other_files_are_refused(tmp_path):
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("hello.txt", "hi")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>" * 100)
    for name in ("pointer.pth", "zip.pth", "text.safetensors", "page.safetensors"):
        assert "damaged" in refusal(tmp_path / name)


@pytest.mark.parametrize("content, expected", [
    ([torch.zeros(2)], "holds a list"),
    (torch.zeros(2), "holds a Tensor"),
    ({}, "holds no tensors"),
    ({"model": {"emb.weight": torch.zeros(2)}, "step": 3}, "a nested table under 'model'"),
    ({"step": 3, "state_dict": {"emb.weight": torch.zeros(2)}}, "holds a int under 'step'"),
    ({"emb.weight": torch.zeros(2), "_strategy": "cuda fp16"}, "holds a str under '_strategy'"),
    ({0: torch.zeros(2)}, "under 0"),
    ({"a": torch.eye(3).to_sparse()}, "'a' in a form"),
    ({"a": torch.zeros(3, device="meta")}, "'a' in a form"),
    ({"a": torch.zeros(3, dtype=torch.complex64)}, "'a' as complex64"),
    ({"a": torch.zeros(3).to(torch.float8_e8m0fnu)}, "'a' as float8_e8m0fnu"),
    ({"a": torch.zeros(3, dtype=torch.uint16)}, "'a' as uint16"),
    ({"\x1b[2J" + "a" * 1000: 1}, "holds a int under '\\x1b[2Jaaa"),
])
def test_what_is_not_a_plain_table_of_tensors_is_refused(tmp_path, content, expected):
    torch.save(content, tmp_path / "model.pth")
    assert expected in refusal(tmp_path / "model.pth")


@given(data=st.binary(min_size=1, max_size=300), ending=st.sampled_from([".pth", ".safetensors"]),
       magic=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", struct.pack("<Q", 8)]))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, data, ending, magic):
    path = tmp_path_factory.getbasetemp() / f"bytes{ending}"
    path.write_bytes(magic + data)
    refusal(path)


def test_a_table_of_too_many_names_is_refused_before_it_is_read(tmp_path):
    names = {f"{number:0800}": None for number in range(50_000)}
    torch.save(names, tmp_path / "model.pth")
    header = {name: {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for name in names}
    (tmp_path / "model.safetensors").write_bytes(hostile.safetensors(header))
    for ending in (".pth", ".safetensors"):
        assert "more than any model's" in refusal(tmp_path / f"model{ending}")


@pytest.mark.parametrize("names", [["a", "_forward_module.a"], ["_forward_module.a", "a"]])
@pytest.mark.parametrize("new", [True, False])
def test_two_names_that_become_one_are_refused(tmp_path, names, new):
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "model.pth", _use_new_zipfile_serialization=new)
    assert "holds 'a' both with and without the prefix _forward_module." in refusal(tmp_path / "model.pth")


# Writing


def test_another_ending_is_refused_before_anything_is_written(weights, tmp_path):
    with pytest.raises(UserError, match="is written as"):
        save_checkpoint(weights, tmp_path / "model.pt")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_full_disk_is_one_line_and_leaves_the_old_file_and_nothing_else(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    save_checkpoint({"a": torch.ones(3)}, path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit makes the system refuse further writes in the middle of the file, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as caught:
            save_checkpoint({"a": torch.zeros(100_000), "b": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(load_checkpoint(path), {"a": torch.ones(3)})


# Fingerprint


def test_the_fingerprint_is_the_one_documented():
    a = b'["a", "torch.float32", [2]]' + struct.pack("<2f", 1, 2)
    b = b'["b", "torch.int64", []]' + struct.pack("<q", 7)
    expected = hashlib.sha256(a + b)
    assert fingerprint({"b": torch.tensor(7), "a": torch.tensor([1.0, 2.0])}) == expected.hexdigest()


def test_one_look_gives_the_fingerprint_and_finds_what_is_not_finite(weights):
    assert fingerprint_if_finite(weights) == (fingerprint(weights), None)
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] = torch.inf
    assert fingerprint_if_finite(weights) == (None, f"{name} (1 of {weights[name].numel()} values)")


def test_the_fingerprint_knows_neither_the_file_nor_the_order(weights, tmp_path):
    expected = fingerprint(weights)
    assert fingerprint(dict(reversed(weights.items()))) == expected
    for ending in ENDINGS:
        save_checkpoint(weights, tmp_path / f"model{ending}")
        assert fingerprint(load_checkpoint(tmp_path / f"model{ending}")) == expected
    assert fingerprint({"a": weights["z.weight"].t()}) == fingerprint({"a": weights["z.weight"].t().contiguous()})


def test_the_fingerprint_tells_every_difference():
    a = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    different = [
        {"a": a}, {"b": a}, {"a": a.reshape(4)}, {"a": a.reshape(1, 2, 2)}, {"a": a.double()}, {"a": a.view(torch.int32)},
        {"a": a * torch.tensor([1.0, -1.0])}, {"a": a.nextafter(a + 1)}, {"a": a, "b": a}, {"a": a[:1], "b": a[1:]},
        {"a": a.bfloat16()}, {"a": a.half()}, {},
    ]
    assert len({fingerprint(weights) for weights in different}) == len(different)


class Stopping(io.BytesIO):
    """A file during whose writing, once it has so many bytes, an error comes up."""

    def __init__(self, size: int, error: BaseException):
        super().__init__()
        self.size, self.error = size, error

    def write(self, data) -> int:
        if self.tell() > self.size:
            raise self.error
        return super().write(data)


@pytest.mark.parametrize("size", [0, 100, 10_000, 200_000])
def test_a_signal_while_an_archive_is_written_is_no_failed_write(size):
    """torch's writer raises an error of its own while it closes what was broken off."""
    stopped = Stopped(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        write_archive({name: torch.ones(9_999) for name in "abcdefgh"}, Stopping(size, stopped))
    assert caught.value is stopped
    with pytest.raises((RuntimeError, OSError)):
        write_archive({name: torch.ones(9_999) for name in "abcdefgh"}, Stopping(size, OSError(28, "No space left on device")))
