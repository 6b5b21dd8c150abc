"""Reads untrusted JSON: within limits, and of the expected shape.

A shape describes a value: a type (`float` takes whole numbers too, `object` takes anything), a tuple of alternative shapes,
`None` for null, `[shape]` for a list, `Texts(most)` for a list of texts of at most so many bytes together, `{str: shape}` for an
object with any keys, and `{"key": shape, "key?": shape}` for an object with these keys, those with a question mark being
optional; other keys are accepted.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

DEEPEST = 64  # lists and objects within each other
# Occurs in any number beyond 64 bits, too large or too close to 0; a function call for each number would take most of the time.
_LARGE = re.compile(r"[0-9]{19}|[eE][+-]?[0-9]{3}")
_LONGEST_NAME = 60  # in a message
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
          type(None): "null"}


@dataclass(frozen=True)
class Texts:
    """A shape, see above."""

    most: int


class BadJson(ValueError):
    """The message says what is wrong, without the file's name: "profile[2].rank is text where a whole number is expected"."""


def parse_json(text: str | bytes, shape: Any = object, most_digits: int = 20) -> Any:
    """The value of a JSON text.

    Args:
        most_digits: if above 20, whole numbers beyond 64 bits are accepted up to this length.

    Raises:
        BadJson: it is not JSON in UTF-8, nested more than `DEEPEST` deep, has NaN, infinity or a number beyond 64 bits, or is
            not of the shape.
    """
    try:
        # By default the json module guesses an encoding, and accepts half characters.
        text = text if isinstance(text, str) else text.decode()
        large = _LARGE.search(text) is not None
        value = json.loads(text, parse_constant=_refuse, parse_int=partial(_integer, most_digits) if large else None,
                           parse_float=_number if large else None)
    except BadJson:
        raise
    except RecursionError:
        raise BadJson(f"it is nested more than {DEEPEST} deep") from None
    except ValueError as error:  # json's message names a position, that of a wrong encoding a byte
        raise BadJson(f"it is not JSON ({' '.join(str(error).split())[:100]})") from None
    if text.count("[") + text.count("{") > DEEPEST:  # otherwise it can't be that deep
        _check_depth(value)
    if (found := _misfit(value, shape)) is not None:
        where, words = found
        raise BadJson(f"{where.removeprefix('.') or 'it'} {words}")
    return value


def _refuse(constant: str) -> None:
    raise BadJson(f"it holds {constant}, which is not a number")


def _integer(most_digits: int, digits: str) -> int:
    # Python handles whole numbers of thousands of digits, and refuses longer ones or takes minutes.
    if len(digits) > most_digits or (most_digits == 20 and not -2**63 <= int(digits) < 2**64):
        raise BadJson(f"it holds a whole number of {len(digits.lstrip('-'))} digits, beyond 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value) or (value == 0 and re.search("[1-9]", re.split("[eE]", digits)[0])):
        raise BadJson(f"it holds {digits[:20]}, beyond the numbers of 64 bits")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 1
    while level := [item for value in level if isinstance(value, dict | list)
                    for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise BadJson(f"it is nested more than {DEEPEST} deep")


def _misfit(value: Any, shape: Any) -> tuple[str, str] | None:
    """The first place in the value that does not fit, such as `.rows[2]`, and what is wrong there; None if all fit."""
    shapes = shape if isinstance(shape, tuple) else (shape,)
    for shape in shapes:
        if _fits(value, shape):
            break
    else:
        return "", f"is {_name(value)} where {' or '.join(map(_expected, shapes))} is expected"
    if isinstance(shape, list):
        for place, item in enumerate(value):
            if (found := _misfit(item, shape[0])) is not None:
                return f"[{place}]{found[0]}", found[1]
    elif isinstance(shape, Texts):
        if (found := _misfit(value, [str])) is not None:
            return found
        if (length := sum(len(text.encode(errors="surrogatepass")) for text in value)) > shape.most:
            return "", f"holds texts of {length} bytes, of at most {shape.most}"
    elif isinstance(shape, dict):
        return _misfit_in_object(value, shape)
    return None


def _misfit_in_object(value: dict[str, Any], shape: dict[Any, Any]) -> tuple[str, str] | None:
    for key, inner in shape.items():
        names = value if key is str else [key.removesuffix("?")]
        for name in names:
            if name not in value:
                if name == key:
                    return "", f"lacks {name}"
            elif (found := _misfit(value[name], inner)) is not None:
                return f".{name[:_LONGEST_NAME]}{found[0]}", found[1]
    return None


def _fits(value: Any, shape: Any) -> bool:
    """Whether the value is of the shape's kind, regardless of its content."""
    if type(value) is shape:
        return True
    if shape is None:
        return value is None
    if isinstance(shape, Texts):
        return isinstance(value, list)
    if isinstance(shape, list | dict):
        return isinstance(value, type(shape))
    if shape in (int, float):
        return isinstance(value, int | shape) and not isinstance(value, bool)
    return isinstance(value, shape)


def _expected(shape: Any) -> str:
    return _NAMES[shape if isinstance(shape, type) else list if isinstance(shape, Texts) else type(shape)]


def _name(value: Any) -> str:
    return _NAMES[type(value)]
