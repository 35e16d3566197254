"""Rotary angles of positions in an ML program.

A table of all positions would be as large as a small model. So a position is split into digits of
base 64, with a table per digit. The formulas of cos(a + b) and sin(a + b) combine the digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var
from torch import Tensor

from lfmc.targets.coreml.constants import Constants
from lfmc.targets.coreml.states import DIGIT


def rotation(
    constants: Constants, positions: Var, name: str, steps: Tensor, context: int
) -> list[Var]:
    """Return cosine and sine, float32 `[T, D / 2]`, of the angles of positions below `context`.

    `steps`, float64 `[D / 2]`, are the angles of position 1.
    """
    rest, unit = positions, 1
    total: list[Var] = []
    while unit < context:
        digit = mb.mod(x=rest, y=np.int32(DIGIT))
        angles = torch.arange(DIGIT).double()[:, None] * unit * steps
        digit_angles = [
            mb.gather(
                x=constants.table(f"{name}.{unit}.{part}", table.float()), indices=digit, axis=0
            )
            for part, table in (("cos", angles.cos()), ("sin", angles.sin()))
        ]
        total = sum_of_angles(total, digit_angles) if total else digit_angles
        rest = mb.floor_div(x=rest, y=np.int32(DIGIT))
        unit *= DIGIT
    return total


def sum_of_angles(a: Sequence[Var], b: Sequence[Var]) -> list[Var]:
    """Return cosine and sine of the sum of two angles, from the cosine and sine of each."""
    cos = mb.sub(x=mb.mul(x=a[0], y=b[0]), y=mb.mul(x=a[1], y=b[1]))
    sin = mb.add(x=mb.mul(x=a[1], y=b[0]), y=mb.mul(x=a[0], y=b[1]))
    return [cos, sin]
