"""How much memory Arrow's values would take as Python's: a value that rows share in Arrow becomes an object for each row."""

from typing import Any

import numpy as np


def unpacked(array: Any) -> int:
    """The fewest bytes that the values of a valid array take, once each is an object of its own."""
    return _sizes(array)[0]


def _sizes(array: Any) -> tuple[int, int]:
    """Bytes of all values together, and at least those of the largest. Each counts 8 besides its content."""
    import pyarrow

    kind, count, types = array.type, len(array), pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _sizes(array.storage)
    if types.is_dictionary(kind):
        lengths = _lengths(array.dictionary)
        if lengths is None:
            return _times(count, array.dictionary)
        return _of(lengths[array.indices.drop_null().to_numpy(zero_copy_only=False)], count)
    if types.is_run_end_encoded(kind):
        return _times(count, array.values)
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        # The lists may overlap.
        lengths = np.nan_to_num(array.drop_null().value_lengths().to_numpy(zero_copy_only=False))
        return _within(_times(int(lengths.sum()), array.values)[0], count)
    if types.is_struct(kind):
        return _within(sum(unpacked(part) for part in array.flatten()), count)
    if any(is_one(kind) for is_one in (types.is_list, types.is_large_list, types.is_fixed_size_list)):
        return _within(unpacked(array.flatten()), count)
    if types.is_map(kind):
        begin, end = (array.offsets[at].as_py() for at in (0, -1))
        return _within(sum(unpacked(part[begin:end]) for part in (array.keys, array.items)), count)
    if types.is_union(kind):
        # A dense one's rows may share a value.
        return _within(sum(_times(count, array.field(number))[0] for number in range(kind.num_fields)), count)
    lengths = _lengths(array)
    return (8 * count, 8) if lengths is None else _of(lengths, count)


def _times(count: int, values: Any) -> tuple[int, int]:
    largest = _sizes(values)[1]
    return count * largest, largest


def _within(n_bytes: int, count: int) -> tuple[int, int]:
    return n_bytes + 8 * count, n_bytes + 8


def _of(lengths: np.ndarray, count: int) -> tuple[int, int]:
    return int(lengths.sum()) + 8 * count, int(lengths.max(initial=0)) + 8


def _lengths(array: Any) -> np.ndarray | None:
    """[n] int64: bytes of each text or byte string, 0 for null; None for other types."""
    import pyarrow
    import pyarrow.compute

    kind, types = array.type, pyarrow.types
    if types.is_string_view(kind) or types.is_binary_view(kind):
        # Each view is 16 bytes and begins with the length.
        views = np.frombuffer(array.buffers()[1] or b"", np.int32)[::4][array.offset:array.offset + len(array)]
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), views, 0).astype(np.int64)
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
            or types.is_fixed_size_binary(kind)):
        return None
    return pyarrow.compute.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
