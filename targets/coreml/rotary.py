"""Rotary angles of positions in an ML program.

A table of all positions would be as large as a small model. So a position is taken apart into
digits of base 64 with a table each, and cos(a + b), sin(a + b) put them together.
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
    """Cosine and sine, float32 `[T, D / 2]`, of the angles of positions below `context`; `steps`
    float64 `[D / 2]` are those of one position."""
    rest, unit = positions, 1
    turned: list[Var] = []
    while unit < context:
        digit = mb.mod(x=rest, y=np.int32(DIGIT))
        angles = torch.arange(DIGIT).double()[:, None] * unit * steps
        own = [
            mb.gather(
                x=constants.table(f"{name}.{unit}.{part}", table.float()), indices=digit, axis=0
            )
            for part, table in (("cos", angles.cos()), ("sin", angles.sin()))
        ]
        turned = sum_of_angles(turned, own) if turned else own
        rest = mb.floor_div(x=rest, y=np.int32(DIGIT))
        unit *= DIGIT
    return turned


def sum_of_angles(a: Sequence[Var], b: Sequence[Var]) -> list[Var]:
    """Cosine and sine of two angles together, of the cosine and sine of each."""
    cos = mb.sub(x=mb.mul(x=a[0], y=b[0]), y=mb.mul(x=a[1], y=b[1]))
    sin = mb.add(x=mb.mul(x=a[1], y=b[0]), y=mb.mul(x=a[0], y=b[1]))
    return [cos, sin]
