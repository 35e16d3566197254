"""What the name of a value tells of it, where a target chooses how to round it."""

from __future__ import annotations

SIGMOID = "sigmoid"  # ends the name of what is between 0 and 1
SCALED, MASKED, BELOW = "scaled", "masked", "below"  # end the names of scores on their way
ROOT, POWERS, INVERSE = "root", "powers", "inverse"  # end the names of functions of one value
PARTS_BY_TABLE = (ROOT, POWERS, INVERSE)
MATRIX = "#matrix"  # ends the name of a matrix of floats


def multiplies(name: str) -> bool:
    """Whether values of that name are the second side of a product: a cache, or a matrix."""
    return name.endswith(MATRIX) or name.startswith(("key_", "value_"))
