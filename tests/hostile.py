"""Files that nobody's program wrote by accident: small, and made to fill memory, to run code, or to be taken for something else.

Each builder returns bytes, so that a test may damage them further.
"""

import io
import json
import pickle
import struct
import zipfile
from typing import Any

import torch


def text(value: str) -> bytes:
    """The pickle instruction that makes a text."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if -2**31 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], held: int, offset: int = 0, storage: str = "FloatStorage",
           key: str = "0", rest: bytes = b"\x89}") -> bytes:
    """The instructions that make a tensor over `held` numbers of data; `rest` are its other arguments."""
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key)
            + text("cpu") + integer(held) + b"tQ" + integer(offset) + integers(shape) + integers(strides) + rest + b"tR")


def table(**tensors: bytes) -> bytes:
    """The instructions that make a table of names."""
    return b"}" + b"".join(text(name) + value + b"s" for name, value in tensors.items())


def pickled(instructions: bytes) -> bytes:
    return b"\x80\x02" + instructions + b"."


def archive(instructions: bytes, data: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive as torch.save writes it, around a pickle of `instructions` and tensors' data by their keys."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as entries:
        entries.writestr("archive/data.pkl", pickled(instructions))
        entries.writestr("archive/byteorder", b"little")
        for key, content in (data or {}).items():
            entries.writestr(f"archive/data/{key}", content)
        entries.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def patched(data: bytes, old: bytes, new: bytes, last: bool = True) -> bytes:
    """`data` with one occurrence of `old` replaced, from the end where the directory stands."""
    at = data.rindex(old) if last else data.index(old)
    return data[:at] + new + data[at + len(old):]


def torch_files() -> dict[str, bytes]:
    """Files that begin as `torch.save`'s do, none of which may be loaded, whatever their ending; each is below 1 MB."""
    four = {"0": bytes(16)}
    plain = archive(table(a=tensor((4,), (1,), 4)), four)
    doubled = b"]q\0"
    for n in range(1, 60):
        doubled = b"]q" + bytes([n]) + b"(" + doubled + b"h" + bytes([n - 1]) + b"e"
    row = b"]q\0(" + integer(7) * 50_000 + b"e"
    sizes, again = integers((1,) * 4000), b"ctorch._utils\n_rebuild_tensor_v2\nh\0R"
    shared = (b"(ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
              + integer(4) + b"tQ" + integer(0) + sizes + sizes + b"\x89}tq\0R" + again * 4000)
    other = b"(ctorch._utils\n_rebuild_tensor_v2\n(" + b"K\0" * 100_000 + b"tq\0R" + (
        b"ctorch._utils\n_rebuild_parameter_with_state\nh\0R" * 15_000 + b"t")
    colliding = b"}(" + b"".join(integer(k * (2**61 - 1)) + b"N" for k in range(1, 40_000)) + b"u"
    old_head = b"".join(pickle.dumps(value, 2) for value in (0x1950a86a20f9469cfc6c, 1001, {"little_endian": True}))
    old_tensor = pickled(table(a=tensor((10**12,), (1,), 10**12, rest=b"\x89}")).replace(b"tQ", b"NtQ"))
    return {
        "one value that claims 2.5 TB": archive(table(a=tensor((10**9, 700), (0, 0), 1)), {"0": bytes(4)}),
        "rows over each other that claim 4 TB": archive(table(a=tensor((10**6, 10**6), (1, 1), 4)), four),
        "an offset behind the data": archive(table(a=tensor((4,), (1,), 4, offset=3)), four),
        "an offset of 2^70": archive(table(a=tensor((4,), (1,), 4, offset=2**70)), four),
        "a shape of 40,000 sizes": archive(table(a=tensor((2**62,) * 40_000, (2**62,) * 40_000, 4)), four),
        "a shape of 4,000 sizes that many share": archive(shared + b"t", four),
        "100,000 arguments that many calls share": archive(other),
        "numbers as keys that all have one hash": archive(colliding),
        "a name of lists doubled 60 times": archive(doubled + text("a") + b"\x93"),
        "a tensor whose attribute replaces it": archive(
            b"}" + text("a") + b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor((4,), (1,), 4) + b"\x89N}"
            + text("data") + tensor((2,), (1,), 4) + b"stRs", four),
        "a negative stride": archive(table(a=tensor((4,), (-1,), 4, offset=3)), four),
        "a negative size": archive(table(a=tensor((-4,), (1,), 4)), four),
        "fewer strides than sizes": archive(table(a=tensor((2, 2), (1,), 4)), four),
        "more data than its entry has": archive(table(a=tensor((5,), (1,), 5)), four),
        "data without an entry": archive(table(a=tensor((4,), (1,), 4, key="9")), four),
        "a storage of no type": archive(table(a=tensor((4,), (1,), 4, storage="FunnyStorage")), four),
        "the old format claims 4 TB": old_head + old_tensor + pickle.dumps(["0"], 2),
        "compressed": archive(table(a=tensor((10**5,), (1,), 10**5)), {"0": bytes(4 * 10**5)}, zipfile.ZIP_DEFLATED),
        "compressed, a list of numbers": archive(b"](" + integer(7) * 100_000 + b"e", None, zipfile.ZIP_DEFLATED),
        "an entry twice": archive(table(a=tensor((4,), (1,), 4)), four).replace(b"archive/version", b"archive/data/0\0"),
        "an entry within another": patched(plain, struct.pack("<I", plain.index(b"archive/byteorder") - 30), bytes(4)),
        "an entry longer than the file": patched(plain, struct.pack("<II", 16, 16), struct.pack("<II", 2**31, 2**31)),
        "an entry of a length that is none": patched(plain, struct.pack("<II", 16, 16), struct.pack("<II", 16, 2**31)),
        "a directory of 65535 entries": patched(plain, struct.pack("<HH", 4, 4), b"\xff\xff\xff\xff"),
        "a directory behind the file": patched(plain, struct.pack("<HH", 4, 4) + plain[-10:-6], b"\4\0\4\0\xff\xff\xff\x7f"),
        "a bytearray of 64 GB": archive(b"c__builtin__\nbytearray\n" + integer(1 << 36) + b"\x85R"),
        "a list copied 10,000 times": archive(b"](" + row + b"ccollections\nOrderedDict\nh\0\x85R" * 10_000 + b"e"),
        "a list of a list of a list, doubled 60 times": archive(doubled),
        "lists within lists 100,000 deep": archive(b"]" * 100_000 + b"a" * 99_999),
        "tuples within tuples as a key": archive(b"})" + b"\x85" * 100_000 + integer(1) + b"s"),
        "a number of 2 GB": archive(b"\x8b\xff\xff\xff\x7f" + b"1" * 100),
        "a text of 4 GB": archive(b"X\xff\xff\xff\xff" + b"1" * 100),
        "a call of what is no name": archive(b"])R"),
        "an object filled": archive(b"ctorch\nFloatStorage\n}b"),
        "no end": archive(b"]" * 1000),
        "nothing": archive(b""),
        "marks without end": archive(b"(" * 100_000),
        "two tables": plain.replace(b"archive/byteorder", b"archives/data.pkl"),
        "code": archive(b"cposix\nsystem\n" + text("true") + b"\x85R"),
        "code of a later protocol": archive(b"\x8c\x05posix\x8c\x06system\x93" + text("true") + b"\x85R"),
    }


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, and any length said of it."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


def safetensors_files() -> dict[str, bytes]:
    """Files of which none may be loaded as a checkpoint or an adapter."""

    def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), begin: int = 0, end: int = 4) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}

    return {
        "a header of 2^60 bytes": safetensors({"a": entry()}, bytes(4), 2**60),
        "a header of 2^64 - 1 bytes": safetensors({"a": entry()}, bytes(4), 2**64 - 1),
        "overlapping data": safetensors({"a": entry(), "b": entry()}, bytes(4)),
        "a hole": safetensors({"a": entry(), "b": entry(begin=8, end=12)}, bytes(12)),
        "more data than said": safetensors({"a": entry()}, bytes(40)),
        "a shape beyond memory": safetensors({"a": entry(shape=(2**32, 2**32))}, bytes(4)),
        "an empty shape beyond 64 bits": safetensors({"a": entry(shape=(2**63, 0), end=0)}),
        "an unknown type": safetensors({"a": entry("F128")}, bytes(4)),
        "exponents of 8 bits": safetensors({"a": entry("F8_E8M0", (4,))}, bytes(4)),
        "numbers of 4 bits": safetensors({"a": entry("F4", (8,))}, bytes(4)),
        "complex numbers": safetensors({"a": entry("C64", end=8)}, bytes(8)),
        "metadata that are no text": safetensors({"__metadata__": {"x": 5}, "a": entry()}, bytes(4)),
        "objects 100,000 deep": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a list": safetensors([1]),
        "half of a character": safetensors(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "no UTF-8": safetensors(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "nothing": b"",
    }


def tokenizer_files() -> dict[str, tuple[str, str]]:
    """`tokenizer.json`s, each with a text; to read the file or to encode the text fails within the `tokenizers` library."""
    plain = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": None,
             "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                       "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                       "vocab": {"a": 0, "b": 1, " ": 2, "ab": 3}, "merges": [["a", "b"]]}}

    def part(**parts: Any) -> str:
        return json.dumps(plain | parts)

    def model(**values: Any) -> str:
        return part(model=plain["model"] | values)

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    catastrophe, doubling = r"(a+)+$", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    replace = {"type": "Replace", "pattern": {"Regex": catastrophe}, "content": ""}
    vocabulary = plain["model"]["vocab"]
    return {
        "an expression that tries without end": (part(pre_tokenizer=split(catastrophe)), "a" * 40 + "b"),
        "an expression that looks ahead without end": (part(pre_tokenizer=split(r"(?=(a+)+b)c")), "a" * 60),
        "a replacement that tries without end": (part(normalizer=replace), "a" * 40 + "b"),
        "replacements that double 25 times": (part(normalizer={"type": "Sequence", "normalizers": [doubling] * 25}), "a"),
        "an expression that is none": (part(pre_tokenizer=split("(a")), "ab"),
        "an expression 5,000 deep": (part(pre_tokenizer=split("(" * 5000 + "a" + ")" * 5000)), "ab"),
        "pieces of length 0": (part(pre_tokenizer={"type": "FixedLength", "length": 0}), "ab"),
        "a map that is none": (part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "ab"),
        "a map that leads out of itself": (part(normalizer={"type": "Precompiled",
                                                            "precompiled_charsmap": "CAAAAP///38AAAAAYQBi"}), "ab ba"),
        "no word for the unknown": (part(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}), "xyz"),
        "no piece for the unknown": (part(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None,
                                                 "byte_fallback": False}), "xyz"),
        "an unknown piece beyond the vocabulary": (part(model={"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 7,
                                                               "byte_fallback": False}), "xyz"),
        "a prefix longer than the words": (model(continuing_subword_prefix="abc", end_of_word_suffix="zzz"), "ab"),
        "a merge of unknown words": (model(merges=[["a", "q"]]), "ab"),
        "an id of 10^12": (model(vocab=vocabulary | {"z": 10**12}), "ab"),
        "an id of 2^31": (model(vocab=vocabulary | {"z": 2**31}), "ab"),
        "an id below 0": (model(vocab=vocabulary | {"z": -1}), "ab"),
        "an id twice": (model(vocab=vocabulary | {"z": 2}), "ab"),
        "dropout of 7": (model(dropout=7.0), "ab"),
        "lists 100,000 deep": ('{"model":' + "[" * 100_000, "ab"),
        "sequences 120 deep": (part(pre_tokenizer=None).replace(
            '"pre_tokenizer": null', '"pre_tokenizer": ' + '{"type": "Sequence", "pretokenizers": [' * 120 + "]}" * 120), "ab"),
        "nothing": ("", "ab"), "null": ("null", "ab"), "a list": ("[1]", "ab"), "a text": ('"\\ud800"', "ab"),
    }
