"""Name patterns of values, by which a target chooses how to round them."""

from __future__ import annotations

SIGMOID = "sigmoid"  # suffix of a value between 0 and 1
SCALED, MASKED, BELOW = "scaled", "masked", "below"  # suffixes of attention scores, in this order
ROOT, POWERS, INVERSE = "root", "powers", "inverse"  # suffixes of functions of one value
PARTS_BY_TABLE = (ROOT, POWERS, INVERSE)
MATRIX = "#matrix"  # suffix of a float matrix


def is_second_operand(name: str) -> bool:
    """Return whether the value is the second operand of a product: a cache, or a matrix."""
    return name.endswith(MATRIX) or name.startswith(("key_", "value_"))
