"""The quantized model as something that learns: every planned tensor with its gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lfmc.calib_free.fit.fake_quant import FakePalette, FakeQuant, straight_through
from lfmc.calib_free.grid.formats import Floats, parse_format
from lfmc.calib_free.grid.packed_tensor import split_rows, stack_rows
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import Parts, parts_of
from lfmc.calib_free.plan.planned_tensors import float_tensor, quantize_tensor
from lfmc.checkpoint.checkpoint import Checkpoint

# Float tensors that learn too. Routers, their biases and gates stay: what they decide is discrete,
# or already at the right place.
LEARNING = ("norm", "conv")

# Steps of Adam at the start: of a latent weight in steps of its grid, of the logarithm of a scale,
# and of a float. In these units the best rates were the same at 2.5, 3.5 and 4.5 bits a weight.
RATE_LATENT, RATE_SCALE, RATE_FLOAT = 4e-3, 5e-4, 3e-4


# float32: the teacher's weight; the latent one, its gradient and Adam's two moments; the weight
# that is stored, and its gradient.
BYTES_PER_PARAM = 28


class StoredFloats(nn.Module):
    """A tensor that is stored as floats of fewer bits than it learns in."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.dtype = value.dtype
        self.value = nn.Parameter(value.float())

    def forward(self) -> Tensor:
        """What is stored, float32."""
        return straight_through(self.value, self.value.detach().to(self.dtype).float())

    def parts(self) -> Parts:
        return {"values": self.value.detach().to(self.dtype).cpu()}


Fake = FakeQuant | FakePalette


def _fake(checkpoint: Checkpoint, plan: BitPlan, stack: list[str]) -> Fake:
    """What learns in place of matrices of one format and width, one below the other."""
    packed = stack_rows([quantize_tensor(checkpoint, plan, name) for name in stack])
    if packed.format.palette:
        return FakePalette(packed)
    return FakeQuant(torch.cat([checkpoint.load(name).float() for name in stack]), packed)


class Student(nn.Module):
    """The tensors `names` of a plan (None: all of them), to be put in place of a decoder's own.

    Those that do not learn are constants. Latent weights are the checkpoint's own, so that a code
    can go back to where it was rounded from. Matrices of one format and width learn as one, their
    rows one below the other: a sparse model has hundreds.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: BitPlan, names: list[str] | None = None
    ) -> None:
        super().__init__()
        rows = [row for row in plan.rows if names is None or row.name in names]
        alike: dict[tuple[str, int], list[str]] = {}
        self.floats: dict[str, StoredFloats] = {}
        for row in rows:
            if isinstance(parse_format(row.format), Floats):
                stored = StoredFloats(float_tensor(checkpoint, plan, row.name))
                self.floats[row.name] = stored.requires_grad_(row.role in LEARNING)
            else:
                alike.setdefault((row.format, row.shape[1]), []).append(row.name)
        self.float_modules = nn.ModuleList(self.floats.values())
        self.stacks = list(alike.values())
        self.heights = [[plan.row(name).shape[0] for name in stack] for stack in self.stacks]
        self.matrices = nn.ModuleList(_fake(checkpoint, plan, stack) for stack in self.stacks)

    def forward(self) -> dict[str, Tensor]:
        """What the plan stores, float32, by name."""
        found = {name: module() for name, module in self.floats.items()}
        for stack, heights, module in zip(self.stacks, self.heights, self.matrices, strict=True):
            found |= zip(stack, module().split(heights), strict=True)
        return found

    def parts(self) -> dict[str, Parts]:
        """What is stored of every tensor that learns, on the CPU."""
        found = {n: m.parts() for n, m in self.floats.items() if m.value.requires_grad}
        for stack, heights, module in zip(self.stacks, self.heights, self.matrices, strict=True):
            pieces = split_rows(cast(Fake, module).packed(), heights)
            found |= zip(stack, map(parts_of, pieces), strict=True)
        return found

    def optimizer(self) -> torch.optim.Adam:
        """Adam with a rate for each kind of parameter."""
        grids = [module for module in self.matrices if isinstance(module, FakeQuant)]
        palettes = [module for module in self.matrices if isinstance(module, FakePalette)]
        rates = {
            RATE_LATENT: [p for m in grids for p in (m.latent, m.zero)],
            RATE_SCALE: [m.log_scale for m in grids] + [m.moved for m in palettes],
            RATE_FLOAT: [m.value for m in self.floats.values()],
        }
        groups = [
            {"params": [p for p in own if p.requires_grad], "lr": rate, "highest": rate}
            for rate, own in rates.items()
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, fused=True)
