"""The content of a `torch.save` file, inspected before PyTorch sees it: names, types, shapes, and whether the data are there.

Today's files are zip archives of uncompressed entries, one of them a pickle and one for each tensor's data; until PyTorch 1.6
they were several pickles followed by the data. In both formats only the directory and the pickles are read.
"""

import math
import mmap
import struct
import zipfile
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import torch

from src.checkpoint.pickled import BadPickle, Named, NamesCode, NotSupported, Reader, Receive, Stored

ZIP = b"PK\x03\x04"
# A pickle names an element's type by a storage's class, or since 8-bit floats by the type itself.
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in (
    ("Double", torch.float64), ("Float", torch.float32), ("Half", torch.float16), ("BFloat16", torch.bfloat16),
    ("Long", torch.int64), ("Int", torch.int32), ("Short", torch.int16), ("Char", torch.int8), ("Byte", torch.uint8),
    ("Bool", torch.bool), ("ComplexFloat", torch.complex64), ("ComplexDouble", torch.complex128), ("QInt8", torch.qint8),
    ("QInt32", torch.qint32), ("QUInt8", torch.quint8))}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_V2, _V3 = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = "torch._tensor._rebuild_from_type_v2"
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
# Other kinds of tensors: sparse, quantized, without data, or of a class of their own.
_OTHER_FORMS = {"torch.serialization._get_layout", "torch.device", "torch.Size",
                *(f"torch._utils.{name}" for name in vars(torch._utils) if name.startswith("_rebuild_")),
                *(f"torch.per_{kind}" for kind in ("tensor_affine", "channel_affine", "channel_affine_float_qparams"))}
KNOWN = frozenset({"collections.OrderedDict", *_STORAGES, *_UNTYPED, *_DTYPES, *_PARAMETERS, *_TYPES, _V2, _V3, _TYPED,
                   *_OTHER_FORMS})
_LATEST_PROTOCOL = 3  # the latest that torch.load reads with weights_only
# Limits on what many tensors may share in the pickle, since each tensor checks all of it.
_MOST_AXES, _MOST_NAMES = 64, 64
# The first two pickles of the format before zip archives are these numbers.
_OLD_FORMAT = (0x1950a86a20f9469cfc6c, 1001)


@dataclass(frozen=True)
class Described:
    """A tensor whose data are all in the file; or, with `dtype` None, anything else that PyTorch would build."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


class Content(NamedTuple):
    """A file's content: lists, tables, texts and numbers as they are, tensors `Described`."""

    value: Any
    tensors: list[Described]


class HasTensors(Exception):
    """A file can't be read item by item, since there are tensors in it."""


def read_content(file: IO[bytes], data: Any, largest: int | None = None, receive: Receive | None = None) -> Content:
    """The content of a `torch.save` file, without reading tensors' data.

    Args:
        file: open for reading, seekable.
        data: its bytes, as any buffer.
        largest: most bytes that names, types and shapes may take.
        receive: gets the items of a list, as in `Reader.read`.

    Raises:
        NamesCode: it names anything but PyTorch's own tensors.
        NotSupported: it is intact, but has tensors of a kind that is not supported.
        BadPickle: it is no such file, damaged, or contradicts itself.
        HasTensors: there is a `receive`, which gets no tensors.
    """
    if bytes(data[:4]) != ZIP:
        tensors = _Tensors(None)
        reader = Reader(data, KNOWN, tensors.describe)
        value = _read_old(reader, _receiving(receive, tensors, data))
        if sum(tensors.sizes.values()) > len(data) - reader.at:
            raise BadPickle("the data of its tensors are not all there")
    else:
        entries = _entries(file, len(data))
        tables = [name for name in entries if name.endswith("/data.pkl")]
        if len(tables) != 1:
            raise BadPickle("it is a zip archive without PyTorch's data")
        start, size = entries[tables[0]]
        if largest is not None and size > largest:
            raise BadPickle(f"its names and shapes alone take {size} bytes, more than any model's")
        folder = f"{tables[0].removesuffix('data.pkl')}data/"
        tensors = _Tensors({name.removeprefix(folder): size for name, (_, size) in entries.items() if name.startswith(folder)})
        reader = Reader(data, KNOWN, tensors.describe, start, start + size)
        value = reader.read(_receiving(receive, tensors, data))
    if receive is not None and tensors.all:
        raise HasTensors
    if tensors.all and reader.protocol > _LATEST_PROTOCOL:
        raise NotSupported(f"was saved with pickle protocol {reader.protocol}, which torch.load does not read safely; save it "
                           "again with torch.save's default")
    return Content(value, tensors.all)


def _receiving(receive: Receive | None, tensors: "_Tensors", data: Any) -> Receive | None:
    """`receive`, but only of items without tensors, and with the memory that a mapped file's bytes took given back."""
    if receive is None:
        return None

    def without_tensors(items: list[Any], at: int) -> dict[int, int]:
        if tensors.all:
            raise HasTensors
        if isinstance(data, mmap.mmap):
            data.madvise(mmap.MADV_DONTNEED, 0, at)
        return receive(items, at)

    return without_tensors


def _entries(file: IO[bytes], length: int) -> dict[str, tuple[int, int]]:
    """Start and size of each entry's data, in bytes. Entries must not overlap and must be uncompressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, OverflowError, struct.error, UnicodeDecodeError):
        raise BadPickle("it is no complete zip archive") from None
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise NamesCode("TorchScript")
    entries, end = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise BadPickle(f"its entry {info.filename[:80]!r} is compressed or encrypted, which torch.save never writes")
        if info.filename in entries:
            raise BadPickle(f"its entry {info.filename[:80]!r} is there twice")
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != ZIP or info.header_offset < end:
            raise BadPickle(f"its entry {info.filename[:80]!r} is not where the directory says, or is within another")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        end = start + info.file_size
        if end > length:
            raise BadPickle(f"its entry {info.filename[:80]!r} ends after the file's end")
        entries[info.filename] = (start, info.file_size)
    return entries


def _read_old(reader: Reader, receive: Receive | None) -> Any:
    if (reader.read(), reader.read()) != _OLD_FORMAT:
        raise BadPickle("it is no file of torch.save")
    reader.read()  # properties of the machine that wrote it
    value = reader.read(receive)
    reader.read()  # the order of the data
    return value


class _Tensors:
    """Turns each call in a pickle into a `Described`, and lists them all.

    Args:
        sizes: bytes of each tensor's data, by the pickle's keys; None if the pickle itself gives them.
    """

    def __init__(self, sizes: dict[str, int] | None):
        self.said, self.sizes = sizes is None, {} if sizes is None else sizes
        self.all: list[Described] = []

    def describe(self, name: str, arguments: tuple) -> Any:
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name in _PARAMETERS and 1 <= len(arguments) <= 4 and isinstance(arguments[0], Described) and _harmless(arguments[3:]):
            return arguments[0]
        if name == _TYPED and len(arguments) == 4 and _harmless(arguments[3:]):
            function, kind, inner, _ = arguments
            if all(isinstance(named, Named) for named in (function, kind)) and isinstance(inner, tuple) and (
                    kind.name in _TYPES and function.name in (_V2, _V3)):
                return self.describe(function.name, inner)
        described = self._plain(*arguments[:4], *arguments[6:8]) if name in (_V2, _V3) and len(arguments) >= 6 else None
        self.all.append(described or Described(None, ()))
        return self.all[-1]

    def _plain(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None,
               metadata: Any = None) -> Described | None:
        """None for a tensor whose stored numbers are not its values."""
        if isinstance(dtype, dict):  # the older function has no type at this position
            dtype, metadata = None, dtype
        if metadata:
            return None
        held, n_bytes = self._storage(storage)
        found = _DTYPES.get(dtype.name) if isinstance(dtype, Named) else held
        if found is None or not all(map(_are_counts, (shape, strides, (offset,)))) or len(shape) != len(strides):
            raise BadPickle("a tensor in it has no type or no shape")
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else 0
        if count and any(size > 1 and not stride for size, stride in zip(shape, strides, strict=True)):
            raise NotSupported("holds an expanded tensor, as expand() makes it, which is not supported; save it after "
                               ".contiguous()")
        # Otherwise a file of a few bytes could fill any memory.
        if max(count, last + 1) * found.itemsize > n_bytes and count:
            raise BadPickle(f"a tensor of {' x '.join(map(str, shape))[:60] or 1} values in it has {n_bytes} bytes of data")
        return Described(found, shape)

    def _storage(self, storage: Any) -> tuple[torch.dtype | None, int]:
        """The type and the bytes of a tensor's data."""
        what = storage.description if isinstance(storage, Stored) else ()
        if not (isinstance(what, tuple) and 5 <= len(what) <= 6 and what[0] == "storage" and isinstance(what[1], Named)
                and isinstance(what[2], str) and _are_counts((what[4],)) and not any(what[5:])):
            raise BadPickle("a tensor in it has no data")
        kind, key, count = what[1].name, what[2], what[4]
        dtype = _STORAGES.get(kind)
        if dtype is None and kind not in _UNTYPED:
            raise BadPickle("a tensor in it has data of no type")
        claimed = count * (1 if dtype is None else dtype.itemsize)
        if self.said:
            self.sizes[key] = max(claimed, self.sizes.get(key, 0))
        if claimed > self.sizes.get(key, -1):
            raise BadPickle("the data of its tensors are not all there")
        return dtype, claimed


def _harmless(state: tuple) -> bool:
    """Whether these attributes, a table by name or none, leave a tensor as it is.

    PyTorch would set any attribute, even one that replaces the tensor's values.
    """
    names = state[0] if state else None
    if not isinstance(names, dict):
        return not names
    return len(names) <= _MOST_NAMES and not any(type(name) is not str or hasattr(torch.nn.Parameter, name) for name in names)


def _are_counts(values: Any) -> bool:
    # No tensor has more axes, and the product of many sizes would be a huge number.
    return isinstance(values, tuple) and len(values) <= _MOST_AXES and all(
        type(value) is int and 0 <= value < 2**63 for value in values)
