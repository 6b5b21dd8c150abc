"""Read JSON that may come from anybody: within limits, and of the expected shape.

A shape is what a value must be: a type (`float` takes whole numbers too, `object` takes anything), a tuple of shapes of which one
must fit, `None` for null, `[shape]` for a list, `{str: shape}` for an object of any keys, and `{"key": shape, "key?": shape}` for
an object with these keys, one with a question mark being optional; other keys are let through.
"""

import json
import math
from typing import Any

DEEPEST = 64  # lists and objects within each other
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
          type(None): "null"}


class BadJson(ValueError):
    """What is wrong, in words, without the file's name: "profile[2].rank is text where a whole number is expected"."""


def parse_json(text: str | bytes, shape: Any = object) -> Any:
    """The value of a JSON text.

    Raises:
        BadJson: it is not JSON in UTF-8, nested more than `DEEPEST` deep, has NaN, infinity or a whole number beyond 64 bits,
            or is not of the shape.
    """
    try:
        # Left to itself the json module guesses an encoding, and lets half characters pass.
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_number)
    except BadJson:
        raise
    except RecursionError:
        raise BadJson(f"it is nested more than {DEEPEST} deep") from None
    except ValueError as error:  # the message of json's own names a position, that of a wrong encoding a byte
        raise BadJson(f"it is not JSON ({' '.join(str(error).split())[:100]})") from None
    _check_depth(value)
    _check(value, shape, "")
    return value


def _refuse(constant: str) -> None:
    raise BadJson(f"it holds {constant}, which is not a number")


def _integer(digits: str) -> int:
    # Python reads and writes whole numbers of thousands of digits, and refuses or takes minutes over longer ones.
    if len(digits) > 20 or not -2**63 <= int(digits) < 2**64:
        raise BadJson(f"it holds a whole number of {len(digits.lstrip('-'))} digits, beyond 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise BadJson(f"it holds {digits[:20]}, beyond the numbers of 64 bits")
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 1
    while level := [item for value in level if isinstance(value, dict | list)
                    for item in (value.values() if isinstance(value, dict) else value) if isinstance(item, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise BadJson(f"it is nested more than {DEEPEST} deep")


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, tuple):
        if not any(map(lambda one: _fits(value, one), shape)):
            raise BadJson(f"{where or 'it'} is {_name(value)} where {' or '.join(map(_expected, shape))} is expected")
        shape = next(one for one in shape if _fits(value, one))
    if not _fits(value, shape):
        raise BadJson(f"{where or 'it'} is {_name(value)} where {_expected(shape)} is expected")
    if isinstance(shape, list):
        for place, item in enumerate(value):
            _check(item, shape[0], f"{where}[{place}]")
    elif isinstance(shape, dict):
        _check_object(value, shape, where)


def _check_object(value: dict[str, Any], shape: dict[Any, Any], where: str) -> None:
    for key, inner in shape.items():
        if key is str:
            for name, item in value.items():
                _check(item, inner, f"{where}.{name}".lstrip("."))
            continue
        name = key.removesuffix("?")
        if name in value:
            _check(value[name], inner, f"{where}.{name}".lstrip("."))
        elif name == key:
            raise BadJson(f"{where or 'it'} lacks {name}")


def _fits(value: Any, shape: Any) -> bool:
    """Whether the value is of the kind that the shape says, whatever is inside it."""
    if shape is None:
        return value is None
    if isinstance(shape, list | dict):
        return isinstance(value, type(shape))
    if shape in (int, float):
        return isinstance(value, int | shape) and not isinstance(value, bool)
    return isinstance(value, shape)


def _expected(shape: Any) -> str:
    return _NAMES[shape if isinstance(shape, type) else type(shape)]


def _name(value: Any) -> str:
    return _NAMES[type(value)]
