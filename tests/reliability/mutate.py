"""Damaged files out of valid ones: blind changes of bytes, and changes that keep a format's own checks content.

Everything is drawn from the generator that is handed in, so that one seed stands for one file.
"""

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, bytes, Random], bytes]

INTERESTING = (b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n\n",
               b'"', b",", b"\\", b"'", b"{", b"[", b"}", b"]", b"NaN", b"1e999", b"-0", b"9" * 400, b"%s", b"\x1b[2J",
               b"PK\x03\x04", b"\x1f\x8b", "٣".encode(), b"\xc0\x80", b"null")
NUMBERS = (b"0", b"-1", b"1e308", b"-1e-320", b"1e999", b"NaN", b"99999999999999999999", b"2147483648", b"9" * 400, b"0x10",
           b"1.5")
DEEP = 3000  # lists within each other


def blind(data: bytes, other: bytes, draw: Random) -> bytes:
    """One to four changes that know nothing of the format."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        data = draw.choice(_CHANGES)(data, other, draw)
    return data


def _flip(data: bytes, _: bytes, draw: Random) -> bytes:
    place = draw.randrange(len(data) or 1)
    return data[:place] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[place:place + 1]) + data[place + 1:]


def _set(data: bytes, _: bytes, draw: Random) -> bytes:
    place = draw.randrange(len(data) or 1)
    return data[:place] + bytes([draw.choice((0, 1, 0x7f, 0x80, 0xff, draw.randrange(256)))]) + data[place + 1:]


def _cut(data: bytes, _: bytes, draw: Random) -> bytes:
    return data[:draw.randrange(len(data) + 1)]


def _insert(data: bytes, _: bytes, draw: Random) -> bytes:
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(INTERESTING) + data[place:]


def _overwrite(data: bytes, _: bytes, draw: Random) -> bytes:
    place, new = draw.randrange(len(data) + 1), draw.choice(INTERESTING)
    return data[:place] + new + data[place + len(new):]


def _drop(data: bytes, _: bytes, draw: Random) -> bytes:
    start, end = _piece(data, draw)
    return data[:start] + data[end:]


def _double(data: bytes, _: bytes, draw: Random) -> bytes:
    start, end = _piece(data, draw)
    return data[:end] + data[start:end] * draw.choice((1, 1, 5)) + data[end:]


def _swap(data: bytes, _: bytes, draw: Random) -> bytes:
    start, end = _piece(data, draw)
    middle = draw.randint(start, end)
    return data[:start] + data[middle:end] + data[start:middle] + data[end:]


def _splice(data: bytes, other: bytes, draw: Random) -> bytes:
    return data[:draw.randrange(len(data) + 1)] + other[draw.randrange(len(other) + 1):]


def _number(data: bytes, _: bytes, draw: Random) -> bytes:
    found = [match.span() for match in re.finditer(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", data[:1 << 20])]
    if not found:
        return data
    start, end = draw.choice(found)
    return data[:start] + draw.choice(NUMBERS) + data[end:]


_CHANGES = (_flip, _set, _cut, _insert, _overwrite, _drop, _double, _swap, _splice, _number)


def _piece(data: bytes, draw: Random) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 4, 16, 256, len(data))))


class _Written(float):
    """A number that is written as it says, be it one that JSON has not or one with 400 digits."""

    def __new__(cls, text: str):
        made = float.__new__(cls, 0.0)
        made.text = text
        return made

    def __repr__(self) -> str:
        return self.text


def json_value(data: bytes, other: bytes, draw: Random) -> bytes:
    """One value of the document, or of one of its lines, becomes another; blind changes where it is no JSON."""
    lines = data.split(b"\n")
    try:
        json.loads(data)
        lines, place = [data], 0
    except ValueError:
        filled = [number for number, line in enumerate(lines) if line.strip()]
        if not filled:
            return blind(data, other, draw)
        place = draw.choice(filled)
    try:
        value = json.loads(lines[place])
    except ValueError:
        return blind(data, other, draw)
    lines[place] = _dump(_changed(value, draw)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _changed(value: Any, draw: Random) -> Any:
    """The value with one of those within it replaced, left out, doubled or renamed."""
    inside = _paths(value)
    path = draw.choice(inside)
    if not path or draw.random() < 0.02:
        return _strange(value, draw)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    last, how = path[-1], draw.random()
    if how < 0.15:
        del holder[last]
    elif how < 0.25 and isinstance(holder, list):
        holder.insert(last, holder[last])
    elif how < 0.25:
        holder[draw.choice((last.upper(), last + "\0", "", "\ud800", last[:-1]))] = holder.pop(last)
    else:
        holder[last] = _strange(holder[last], draw)
    return value


def _paths(value: Any) -> list[tuple]:
    found, queue = [], [((), value)]
    while queue and len(found) < 5000:
        path, value = queue.pop()
        found.append(path)
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        queue += [((*path, key), item) for key, item in inside]
    return found


def _strange(value: Any, draw: Random) -> Any:
    deep = []
    for _ in range(draw.choice((70, DEEP))):
        deep = [deep]
    return draw.choice((
        None, True, "", " ", "text", "\ud800", "\0", "\x1b[2J", "[/b]", "../../x", "x" * 5000, [], {}, [value], {"": value}, [[]],
        [None], 0, -1, 1, 2**31, 2**63, 2**64, -2**63 - 1, 10**30, 1.5, -0.0, 1e308, 5e-324, _Written("9" * 400), _Written("NaN"),
        _Written("-Infinity"), _Written("1e999"), deep, str(value), [value] * 3))


def _dump(value: Any) -> str:
    """JSON of anything: `json.dumps` follows neither 3000 lists within each other nor numbers written otherwise."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        depth = 0
        while isinstance(value, list) and len(value) == 1:
            value, depth = value[0], depth + 1
        inner = ",".join(map(_dump, value)) if isinstance(value, list) else _dump(value)
        inner = f"[{inner}]" if isinstance(value, list) else inner
        return "[" * depth + inner + "]" * depth
    return repr(value) if isinstance(value, _Written) else json.dumps(value, ensure_ascii=False)


def zip_entry(data: bytes, other: bytes, draw: Random) -> bytes:
    """One entry of an archive changed, left out, doubled or renamed, and all checksums right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:
        return blind(data, other, draw)
    place, how = draw.randrange(len(entries)), draw.random()
    if draw.random() < 0.7:  # the pickle, in which all that is not numbers stands
        place = next((number for number, (name, _) in enumerate(entries) if name.endswith("data.pkl")), place)
    name, content = entries[place]
    if how < 0.08:
        del entries[place]
    elif how < 0.13:
        entries.insert(place, (name, blind(content, other, draw)))
    elif how < 0.18:
        names = (name.upper(), f"../{name}", "archive/data.pkl", "archive/data/0", "archive/byteorder")
        entries[place] = (draw.choice(names), content)
    else:
        entries[place] = (name, blind(content, content, draw))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in entries:
            # torch maps an entry only where it is not compressed.
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_STORED if draw.random() < 0.95 else zipfile.ZIP_DEFLATED)
    return made.getvalue()


def safetensors_header(data: bytes, other: bytes, draw: Random) -> bytes:
    """One value of the header changed, or of the JSON that stands as text within it, and the header's length right again."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + size])
    except (struct.error, ValueError):
        return blind(data, other, draw)
    kept = header.get("__metadata__", {})
    within = [key for key, text in kept.items() if text[:1] in ("{", "[")]
    if within and draw.random() < 0.7:
        key = draw.choice(within)
        kept[key] = json_value(kept[key].encode(), other, draw).decode("utf-8", "replace")
        text = _dump(header).encode("utf-8", "surrogatepass")
    else:
        text = json_value(json.dumps(header).encode(), other, draw)
    return struct.pack("<Q", len(text)) + text + data[8 + size:]


def gzipped(data: bytes, other: bytes, draw: Random) -> bytes:
    """What is compressed changed, and compressed again; now and then the archive itself."""
    import gzip

    if draw.random() < 0.3:
        return blind(data, other, draw)
    try:
        return gzip.compress(blind(gzip.decompress(data), other, draw), mtime=0)
    except (OSError, EOFError):
        return blind(data, other, draw)
