"""The rounding of activations in ONNX Runtime's n-bit kernels, reproduced in torch.

The rules were found by reproducing the kernels' results to 5e-7 (ONNX Runtime 1.31, x86-64):

| operator | accuracy level 0 | accuracy level 4 |
|---|---|---|
| MatMulNBits, all widths | float32 | int8 per row and block |
| QMoE 4 bit | float32 | int8 per row and block |
| QMoE 8 bit | int8 per row and block | int8 per row and block |
| QMoE 2 bit | lookup tables of rounded sums | lookup tables of rounded sums |

So no kernel is *less* exact than 8-bit activations, and parity can compare the artifact with the
same rounding in torch instead of using a loose tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lfmc.calib_free.grid.packed_tensor import unpack_bits
from lfmc.graph.program import Program
from lfmc.passes.pattern import arguments
from lfmc.reference.operators import (
    Matrix,
    NbitMatrix,
    Operators,
    as_floats,
    has_nbit_matrix,
    read_matrix,
)
from lfmc.targets.shared.rounded_operators import group_codes, round_groups

# A value this close to the middle of two codes, in codes, may round to either code. One float32
# operation in another order moves a value of up to 127 codes by about 1e-5, and a preceding matmul
# moves it by 4e-5. If the terms of its sums cancel, it moves by the rounding error of these terms
# (`_slack`): 1.4e-4 was measured.
TIE = 2e-5
TIE_BEHIND_MATMUL = 1e-4
ROUNDING = 2.0**-24  # relative rounding error of float32


def table_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int
) -> Tensor:
    """Compute the product of the 2-bit kernel, which rounds sums of 4 activations to int8.

    The kernel has a table of these sums for every sign pattern. `x` is `[N, K]`, `codes`
    `[rows, K]` of 0..3, `scales` and `zeros` `[rows, G]`. The two bits of a code are signs:
    `code - 1.5 = sign_0 / 2 + sign_1`. The rest of the zero point is computed exactly.
    """
    count, size = x.shape
    rows, fours = codes.shape[0], size // 4
    sums, step = _table_codes(x, group)
    table = torch.round(sums) * step
    spread = scales.float().repeat_interleave(group // 4, dim=1)  # (rows, K / 4)
    powers = 1 << torch.arange(4)
    picks = torch.zeros(rows, fours, 16)
    for bit, share in ((0, 0.5), (1, 1.0)):
        pattern = (((codes >> bit) & 1).view(rows, fours, 4).long() * powers).sum(-1, keepdim=True)
        picks.scatter_add_(2, pattern, (share * spread).unsqueeze(-1))
    y = table.flatten(1) @ picks.flatten(1).T
    middle = 2.0 if zeros is None else zeros.float()
    return y + x.view(count, -1, group).sum(-1) @ (scales.float() * (1.5 - middle)).T


def tied(x: Tensor, group: int, *, tables: bool, slack: Tensor | None = None) -> Tensor:
    """Return, as bool `[N]`, the rows of `x` `[N, K]` with a value that may round either way.

    If `x` comes from a matmul, `slack` `[N, K]` is how far another order of its sums may move each
    value.
    """
    codes, step = _table_codes(x, group) if tables else group_codes(x, group)
    near = torch.tensor(TIE)
    if slack is not None:
        spread = slack.view(len(x), -1, 4).sum(-1, keepdim=True) if tables else slack.view_as(codes)
        near = (TIE + spread / step.clamp_min(1e-30)).clamp_min(TIE_BEHIND_MATMUL)
    return ((codes - codes.floor() - 0.5).abs() < near).flatten(1).any(1)


def _table_codes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the unrounded table entries of the 2-bit kernel, `[N, K / 4, 16]`, and their steps."""
    count, size = x.shape
    block = 64 if group % 64 == 0 else 32  # activations that share a table scale
    signs = (torch.arange(16).unsqueeze(1) & (1 << torch.arange(4))) > 0
    sums = x.view(count, size // 4, 4) @ torch.where(signs, 1.0, -1.0).T
    peak = x.abs().view(count, -1, block // 4, 4).sum(-1).amax(-1) / 127.0  # (N, K / block)
    step = peak.repeat_interleave(block // 4, dim=1).unsqueeze(-1)
    return sums * torch.where(step > 0, 1.0 / step, 0.0), step


def rounds_always(program: Program) -> bool:
    """Return whether an operator (experts of 2 or 8 bits) rounds at every accuracy level."""
    return any(
        isinstance(weight, fx.Node) and weight.op == "call_function" and weight.args[3] in (2, 8)
        for node in program.nodes("lfm.moe")
        for weights in arguments(node)[3:6]
        for weight in weights
    )


def run_alone(
    program: Program, node: fx.Node, inputs: Sequence[Tensor], *, exact_experts: bool
) -> tuple[Tensor, Tensor]:
    """Run one n-bit operator of the program, with the rounding of the artifact, on `inputs`.

    `inputs` are its tensors other than the weights. `exact_experts` is as in `KernelOperators`.
    Returns the result `[..., N]` and a bool for each of its rows that depends on a rounding tie.
    """
    remaining_inputs = iter(inputs)
    operators = KernelOperators(exact=False, exact_experts=exact_experts)

    def value(argument: fx.Node) -> Any:
        if argument.op == "get_attr":
            return program.constant(str(argument.target))
        return (
            read_matrix(program, argument) if has_nbit_matrix(argument) else next(remaining_inputs)
        )

    result: Tensor
    if has_nbit_matrix(node):  # a separate node of the artifact adds the bias
        result = operators.linear(next(remaining_inputs), read_matrix(program, node), None)
    else:
        result = operators.call(node, fx.map_arg(arguments(node), value), {})
    rows = result.flatten(0, -2).shape[0]
    ties = operators.ties
    return result, torch.zeros(rows, dtype=torch.bool) if ties is None else ties


class KernelOperators(Operators):
    """Operators that round activations as ONNX Runtime's kernels do.

    `exact` selects accuracy level 0; otherwise the level is 4. `exact_experts` selects level 0 for
    experts only, as in an artifact whose QMoE nodes have no level. `ties` are the rows of the last
    n-bit operator that depend on a rounding tie.
    """

    def __init__(self, *, exact: bool, exact_experts: bool = False) -> None:
        self._exact, self._exact_experts = exact, exact or exact_experts
        self.ties: Tensor | None = None

    def linear(self, x: Tensor, matrix: NbitMatrix, bias: Tensor | None) -> Tensor:
        if not self._exact:
            self.ties = tied(x.flatten(0, -2), matrix.group, tables=False)
            x = round_groups(x, matrix.group)
        return super().linear(x, matrix, bias)

    def moe(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.ties = torch.zeros(len(x), dtype=torch.bool)
        return super().moe(x, *args, **kwargs)

    def expert(self, tokens: Tensor, x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> Tensor:
        gate_output, gate_ties = _matmul(x, gate, self._exact_experts)
        up_output, _ = _matmul(x, up, self._exact_experts)
        slack = _slack(x, gate_output, up_output, gate, up)
        inner = F.silu(gate_output) * up_output
        output, down_ties = _matmul(inner, down, self._exact_experts, slack)
        assert self.ties is not None
        self.ties[tokens] |= gate_ties | down_ties
        return output


def _slack(x: Tensor, gate: Tensor, up: Tensor, w1: Matrix, w3: Matrix) -> Tensor:
    """Return how far rounding the terms of both sums may move `silu(gate) * up`, `[N, K]`."""
    terms = [F.linear(x.abs(), as_floats(w).abs()) for w in (w1, w3)]
    max_slope = 1.1  # of silu
    return ROUNDING * (max_slope * terms[0] * up.abs() + F.silu(gate).abs() * terms[1])


def _matmul(
    x: Tensor, weight: Matrix, exact: bool, slack: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the product of `x` with an expert's matrix, and the rows that depend on a tie.

    `slack` is given for w2, whose `x` comes from a matmul. The kernel joins the other two matrices,
    w1 and w3, to one with twice the rows.
    """
    is_gate_or_up = slack is None
    no_ties = torch.zeros(len(x), dtype=torch.bool)
    if isinstance(weight, Tensor):
        return F.linear(x, weight), no_ties
    rows = len(weight.codes) * (2 if is_gate_or_up else 1)
    group = weight.group
    if weight.bits == 2:
        if rows % 128 or weight.columns % group:  # the table kernel does not support these shapes
            return F.linear(x, weight.floats), no_ties
        codes = unpack_bits(weight.codes, weight.bits, weight.columns)
        y = table_matmul(x, codes, weight.scales, weight.zeros, group)
        return y, tied(x, group, tables=True, slack=slack)
    if weight.bits == 8 or not exact:
        ties = tied(x, group, tables=False, slack=slack)
        return F.linear(round_groups(x, group), weight.floats), ties
    return F.linear(x, weight.floats), no_ties
