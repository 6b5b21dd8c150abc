"""Numbers as people write them in flags and tables: ASCII digits, bounds, and nothing that a float would quietly hold as 0."""

import re

# Least and most of what is not 0: learning rates; what a loss or an adapter is multiplied with; chances and decays.
RATE, STRENGTH, BELOW_ONE = (1e-12, 1e6), (1e-6, 1e6), (1e-12, 0.9999999)
# Python's own float() takes more than anybody means: underscores, digits of other scripts, spaces, nan, infinity.
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_number(text: str) -> float | None:
    """The number; None where the text is none, or is another than 0 that lies too close to 0 for a float, such as 1e-400.

    Infinity where it is too large for one. -0 is 0.
    """
    if not (found := _NUMBER.fullmatch(text)):
        return None
    value = float(text)
    if value == 0:
        return None if re.search("[1-9]", found[1]) else 0.0
    return value
