"""What ONNX Runtime's n-bit kernels do to activations, in torch.

Found by reproducing their results to 5e-7 (ONNX Runtime 1.31, x86-64):

| operator | accuracy level 0 | accuracy level 4 |
|---|---|---|
| MatMulNBits, all widths | float32 | int8 per row and block |
| QMoE 4 bit | float32 | int8 per row and block |
| QMoE 8 bit | int8 per row and block | the same |
| QMoE 2 bit | lookup tables of rounded sums | the same |

So a width is never *less* exact than its activations' 8 bits, and parity can compare the artifact
with the same rounding instead of with a loose tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lfmc.calib_free.grid.packed_tensor import unpack_bits
from lfmc.graph.program import Program
from lfmc.model.experts import choose_experts
from lfmc.passes.pattern import arguments
from lfmc.targets.shared.rounded_program import group_codes, round_groups

# How near to the middle of two codes a value may fall either way, in codes: one float32 operation
# in another order moves a value of up to 127 codes by about 1e-5, a matmul before it by 4e-5; and
# where its sums cancel, by a rounding of what they are made of (`_slack`): 1.4e-4 was seen.
TIE = 2e-5
TIE_BEHIND_MATMUL = 1e-4
ROUNDING = 2.0**-24  # of float32, over the value


def table_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int
) -> Tensor:
    """The 2-bit kernel: sums of 4 activations with every sign pattern, rounded to int8.

    `x` `[N, K]`, `codes` `[rows, K]` of 0..3, `scales` and `zeros` `[rows, G]`. A code's two bits
    are signs: `code - 1.5 = sign_0 / 2 + sign_1`; the rest of the zero point is exact.
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
    """Bool `[N]`: rows of `x` `[N, K]` with a value that may round either way; behind a matmul,
    `slack` `[N, K]` is what another order of its sums may move each value by."""
    codes, step = _table_codes(x, group) if tables else group_codes(x, group)
    near = torch.tensor(TIE)
    if slack is not None:
        own = slack.view(len(x), -1, 4).sum(-1, keepdim=True) if tables else slack
        spread = own if tables else own.view_as(codes)
        near = (TIE + spread / step.clamp_min(1e-30)).clamp_min(TIE_BEHIND_MATMUL)
    return ((codes - codes.floor() - 0.5).abs() < near).flatten(1).any(1)


def _table_codes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Entries of the 2-bit kernel's tables before rounding, `[N, K / 4, 16]`, and their steps."""
    count, size = x.shape
    block = 64 if group % 64 == 0 else 32  # activations that share a table scale
    signs = (torch.arange(16).unsqueeze(1) & (1 << torch.arange(4))) > 0
    sums = x.view(count, size // 4, 4) @ torch.where(signs, 1.0, -1.0).T
    peak = x.abs().view(count, -1, block // 4, 4).sum(-1).amax(-1) / 127.0  # (N, K / block)
    step = peak.repeat_interleave(block // 4, dim=1).unsqueeze(-1)
    return sums * torch.where(step > 0, 1.0 / step, 0.0), step


class KernelReference(nn.Module):
    """A bound program whose n-bit operators treat activations as ONNX Runtime's kernels do.

    With `exact`, as at accuracy level 0; else as the artifact ships, at level 4.
    """

    def __init__(self, program: fx.GraphModule, *, exact: bool) -> None:
        super().__init__()
        self.program = program
        self.exact = exact

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _Interpreter(self.program, self.exact).run(*inputs)  # type: ignore[no-any-return]


def rounds_always(program: Program) -> bool:
    """Some operator rounds activations at every accuracy level: experts of 2 or 8 bits."""
    return any(
        isinstance(weight, fx.Node) and weight.op == "call_function" and weight.args[3] in (2, 8)
        for node in program.nodes("lfm.moe")
        for weights in arguments(node)[3:6]
        for weight in weights
    )


def run_alone(program: Program, node: fx.Node, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One n-bit operator as shipped, on the tensors (not the weights) that it is given.

    Returns its result `[..., N]` and which of its rows, bool, hang on a rounding tie.
    """
    given = iter(inputs)
    interpreter = _Interpreter(program.module, exact=False)

    def value(argument: fx.Node) -> Any:
        if argument.op == "get_attr":
            return interpreter.fetch_attr(str(argument.target))
        if argument.target is torch.ops.lfm.dequantize.default:
            return _Quantized(*fx.map_arg(arguments(argument), value))
        return next(given)

    call = list(fx.map_arg(arguments(node), value))
    if node.target is torch.ops.lfm.linear_nbits.default:
        call[4] = None  # the bias is added by a node of its own
    result: Tensor = interpreter.call_function(node.target, tuple(call), {})
    rows = result.flatten(0, -2).shape[0]
    ties = interpreter.ties
    return result, torch.zeros(rows, dtype=torch.bool) if ties is None else ties


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, exact: bool) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.exact = exact
        self.ties: Tensor | None = None  # rows of the last n-bit operator that hang on a tie

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ops = torch.ops.lfm
        if target is ops.linear_nbits.default and not self.exact:
            self.ties = tied(args[0].flatten(0, -2), args[6], tables=False)
            args = (round_groups(args[0], args[6]), *args[1:])
        if target is ops.dequantize.default:
            return _Quantized(*args)
        if target is ops.moe.default:
            return self._moe(*args)
        return super().call_function(target, args, kwargs)

    def _moe(
        self,
        x: Tensor,
        scores: Tensor,
        choice: Tensor,
        w1: Sequence[Any],
        w3: Sequence[Any],
        w2: Sequence[Any],
        top_k: int,
        normalize: bool,
        scale: float,
    ) -> Tensor:
        chosen, weights = choose_experts(scores, choice, top_k, normalize, scale)
        y, self.ties = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
        for index, (one, three, two) in enumerate(zip(w1, w3, w2, strict=True)):
            token, slot = torch.where(chosen == index)
            if len(token) == 0:
                continue
            own = x[token]
            (gate, ties), (up, _) = (_matmul(own, w, self.exact) for w in (one, three))
            inner, slack = F.silu(gate) * up, _slack(own, gate, up, one, three)
            out, more = _matmul(inner, two, self.exact, slack)
            y.index_add_(0, token, out * weights[token, slot].unsqueeze(-1))
            self.ties[token] |= ties | more
        return y


class _Quantized:
    """An expert's weight, kept as codes until it is known which kernel multiplies by it."""

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group: int,
        columns: int,
    ) -> None:
        self.bits, self.group, self.scales, self.zeros = bits, group, scales, zeros
        self.columns, self._packed = columns, codes
        self.codes = unpack_bits(codes, bits, scales.shape[1] * group)

    def floats(self) -> Tensor:
        """The weight itself, as every other part of lfmc dequantizes it."""
        parts = (self._packed, self.scales, self.zeros, self.bits, self.group, self.columns)
        return torch.ops.lfm.dequantize(*parts)  # type: ignore[no-any-return]


def _slack(x: Tensor, gate: Tensor, up: Tensor, w1: Any, w3: Any) -> Tensor:
    """What a rounding of every term of both sums may move `silu(gate) * up` by, `[N, K]`."""
    terms = [
        F.linear(x.abs(), (w if isinstance(w, Tensor) else w.floats()).abs()) for w in (w1, w3)
    ]
    steepest = 1.1  # of silu
    return ROUNDING * (steepest * terms[0] * up.abs() + F.silu(gate).abs() * terms[1])


def _matmul(
    x: Tensor, weight: Any, exact: bool, slack: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` times an expert's matrix, and the rows that hang on a rounding tie; `slack` is that of an
    `x` behind a matmul, so w2's. The others (w1 with w3) are one of twice the rows in the kernel.
    """
    paired = slack is None
    nothing = torch.zeros(len(x), dtype=torch.bool)
    if isinstance(weight, Tensor):
        return F.linear(x, weight), nothing
    rows = weight.codes.shape[0] * (2 if paired else 1)
    group = weight.group
    if weight.bits == 2:
        if rows % 128 or weight.columns % group:  # the table kernel does not take these shapes
            return F.linear(x, weight.floats()), nothing
        y = table_matmul(x, weight.codes, weight.scales, weight.zeros, group)
        return y, tied(x, group, tables=True, slack=slack)
    if weight.bits == 8 or not exact:
        ties = tied(x, group, tables=False, slack=slack)
        return F.linear(round_groups(x, group), weight.floats()), ties
    return F.linear(x, weight.floats()), nothing
