"""Numbers in flags and tables: ASCII digits, bounds, and nothing that a float would silently turn into 0."""

import re

# Ranges of values other than 0: learning rates; factors on losses and adapters; probabilities and decays.
RATE, STRENGTH, BELOW_ONE = (1e-12, 1e6), (1e-6, 1e6), (1e-12, 0.9999999)
# Python's float() accepts too much: underscores, digits of other scripts, spaces, nan, infinity.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_number(text: str) -> float | None:
    """The number; None if the text is not a number, or one that is not 0 but too close to it for a float, such as 1e-400.

    Infinity if it is too large for a float. -0 is 0.
    """
    if not (found := _NUMBER.fullmatch(text)):
        return None
    value = float(text)
    if value == 0:
        return None if re.search("[1-9]", found[1]) else 0.0
    return value
