"""The trainable form of a quantized model: every tensor of a plan, with gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lfmc.calib_free.fit.fake_quant import FakePalette, FakeQuant, straight_through
from lfmc.calib_free.grid.formats import Floats, parse_format
from lfmc.calib_free.grid.packed_tensor import split_rows, stack_rows
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import Parts, tensor_parts
from lfmc.calib_free.plan.planned_tensors import float_tensor, quantize_tensor
from lfmc.checkpoint.checkpoint import Checkpoint

# Roles of float tensors that are trained. Routers, their biases and gates are not: routing is
# discrete, and gates are already at the right value.
TRAINED_ROLES = ("norm", "conv")

# Learning rates of Adam: of latent weights (in steps of their grid), of the logarithms of scales,
# and of floats. In these units the best rates were the same at 2.5, 3.5 and 4.5 bits a weight.
RATE_LATENT, RATE_SCALE, RATE_FLOAT = 4e-3, 5e-4, 3e-4

# Seven float32 numbers: the teacher's weight; the latent weight, its gradient and Adam's two
# moments; the stored weight and its gradient.
BYTES_PER_PARAM = 28


class StoredFloats(nn.Module):
    """A float tensor that is trained in float32 and stored in its original dtype."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.dtype = value.dtype
        self.value = nn.Parameter(value.float())

    def forward(self) -> Tensor:
        """Return the stored value as float32."""
        return straight_through(self.value, self.value.detach().to(self.dtype).float())

    def parts(self) -> Parts:
        """Return the stored value, on the CPU."""
        return {"values": self.value.detach().to(self.dtype).cpu()}


FakeMatrix = FakeQuant | FakePalette


def _fake_matrix(checkpoint: Checkpoint, plan: BitPlan, stack: list[str]) -> FakeMatrix:
    """Return the trainable form of the matrices `stack`, which share format and column count."""
    packed = stack_rows([quantize_tensor(checkpoint, plan, name) for name in stack])
    if packed.format.palette:
        return FakePalette(packed)
    return FakeQuant(torch.cat([checkpoint.load(name).float() for name in stack]), packed)


class Student(nn.Module):
    """The tensors `names` of a plan (None: all of them), which replace the weights of a decoder.

    Tensors that are not trained are constants. Latent weights start from the checkpoint's weights,
    so that training can undo a rounding. Matrices of the same format and column count are stacked
    by rows and trained as one, because a sparse model has hundreds of them.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: BitPlan, names: list[str] | None = None
    ) -> None:
        super().__init__()
        rows = [row for row in plan.rows if names is None or row.name in names]
        stacks: dict[tuple[str, int], list[str]] = {}
        self.floats: dict[str, StoredFloats] = {}
        for row in rows:
            if isinstance(parse_format(row.format), Floats):
                module = StoredFloats(float_tensor(checkpoint, plan, row.name))
                self.floats[row.name] = module.requires_grad_(row.role in TRAINED_ROLES)
            else:
                stacks.setdefault((row.format, row.shape[1]), []).append(row.name)
        self.float_modules = nn.ModuleList(self.floats.values())
        self.stacks = list(stacks.values())
        self.heights = [[plan.row(name).shape[0] for name in stack] for stack in self.stacks]
        self.matrices = nn.ModuleList(
            _fake_matrix(checkpoint, plan, stack) for stack in self.stacks
        )

    def forward(self) -> dict[str, Tensor]:
        """Return the stored weights as float32, by name."""
        weights = {name: module() for name, module in self.floats.items()}
        for stack, heights, module in zip(self.stacks, self.heights, self.matrices, strict=True):
            weights |= zip(stack, module().split(heights), strict=True)
        return weights

    def parts(self) -> dict[str, Parts]:
        """Return the stored parts of every tensor that is trained, on the CPU."""
        parts = {n: m.parts() for n, m in self.floats.items() if m.value.requires_grad}
        for stack, heights, module in zip(self.stacks, self.heights, self.matrices, strict=True):
            pieces = split_rows(cast(FakeMatrix, module).packed(), heights)
            parts |= zip(stack, map(tensor_parts, pieces), strict=True)
        return parts

    def optimizer(self) -> torch.optim.Adam:
        """Return an Adam optimizer with a learning rate for each kind of parameter."""
        grids = [module for module in self.matrices if isinstance(module, FakeQuant)]
        palettes = [module for module in self.matrices if isinstance(module, FakePalette)]
        rates = {
            RATE_LATENT: [p for m in grids for p in (m.latent, m.zero)],
            RATE_SCALE: [m.log_scale for m in grids] + [m.shift for m in palettes],
            RATE_FLOAT: [m.value for m in self.floats.values()],
        }
        groups = [
            {"params": [p for p in parameters if p.requires_grad], "lr": rate, "highest": rate}
            for rate, parameters in rates.items()
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12, fused=True)
