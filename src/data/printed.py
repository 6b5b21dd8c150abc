"""Values that a text holds, such as a CSV's cell: as JSON, or as Python, numpy, pandas and `datasets` print them.

numpy prints an array's entries without commas, over several lines, within an array of objects as `array(...)` or `list(...)`,
and of more than 1000 entries only the first and the last three. From version 2 on it names its types: `np.float64(1.0)`.
"""

import ast
import json
import math
import re
import warnings
from itertools import pairwise
from typing import Any

# A string, also one that is not closed; a sign; a word or number. Possessive, so that no part of a text is scanned twice:
# otherwise a million blank lines take hours.
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.|\\\Z)*+(?:'|\Z)|"(?:[^"\\]|\\.|\\\Z)*+(?:"|\Z)"""
                    r"""|[\[\](){},:]|[^\s'"\[\](){},:]++""", re.DOTALL)
_NAMES = {"nan": math.nan, "inf": math.inf}
_CALLS = ("array", "list")
_TYPES = re.compile(r"(?:float|u?int|long|str|bytes|bool)\w*")  # of numpy


def parse(text: str) -> Any | None:
    """The value of a text that is JSON, or that Python or numpy printed; None for any other text.

    Of Python's literals, tuples and single values that JSON lacks are read too, but no sets, and no objects whose keys are not
    texts. An Ellipsis stands for entries that numpy left out.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    source = _with_commas(text.strip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes are data here
            return _literal(ast.parse(source, mode="eval").body)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _with_commas(text: str) -> str:
    """The text with commas in the lists that have none, without which Python would join strings next to each other.

    Elsewhere nothing is missing: Python's pprint makes several strings of a long one, in a dict or in a list with commas.
    """
    missing: list[int] = []
    # For each open bracket the places where a value follows another; None where a comma was seen, and for other brackets.
    levels: list[list[int] | None] = []
    end = -1  # of the value before, at this level
    for match in _TOKEN.finditer(text):
        token, places = match[0], levels[-1] if levels else None
        if token in ",:":
            end = -1
            if levels:
                levels[-1] = None
            continue
        if token in ")]}":
            missing += (levels.pop() if levels else None) or []
        elif places is not None and 0 <= end < match.start():
            places.append(end)
        end = match.end()
        if token in "([{":
            levels.append([] if token == "[" else None)
            end = -1
    borders = [0, *sorted(missing), len(text)]
    return ", ".join(text[start:stop] for start, stop in pairwise(borders))


def _literal(node: ast.expr) -> Any:
    """The value of a parsed literal. Raises ValueError for anything else, and for kinds that JSON has no counterpart of."""
    match node:
        case ast.Constant():
            return node.value
        case ast.List():
            return list(map(_literal, node.elts))
        case ast.Tuple():
            return tuple(map(_literal, node.elts))
        case ast.Dict():
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
            if len(keys) == len(node.keys):
                return dict(zip(keys, map(_literal, node.values), strict=True))
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub()):
            number = _literal(node.operand)
            if isinstance(number, int | float) and not isinstance(number, bool):
                return -number
        case ast.Call(func=ast.Name(id=name), args=[entries]) if name in _CALLS:
            return _literal(entries)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="np"), attr=name), args=[value]) if _TYPES.fullmatch(name):
            return _literal(value)
        case ast.Attribute(value=ast.Name(id="np"), attr="True_" | "False_"):
            return node.attr == "True_"
    raise ValueError(f"{type(node).__name__} where a value is expected")
