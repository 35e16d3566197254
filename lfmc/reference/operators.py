"""Computes the operators of a program in torch; a target rounds activations as its runtime does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import lfmc.graph.ops  # noqa: F401  (registers the operators)
from lfmc.graph.program import Program
from lfmc.model.experts import choose_experts


@dataclass
class NbitMatrix:
    """A matrix as codes, scales and zero points, in the form of `lfm::dequantize`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    columns: int

    @cached_property
    def floats(self) -> Tensor:
        """The dequantized matrix, float32 `[rows, columns]`; computed once."""
        values: Tensor = torch.ops.lfm.dequantize(
            self.codes, self.scales, self.zeros, self.bits, self.group, self.columns
        )
        return values


Matrix = Tensor | NbitMatrix


def as_floats(matrix: Matrix) -> Tensor:
    """Return a matrix as floats."""
    return matrix.floats if isinstance(matrix, NbitMatrix) else matrix


class Operators:
    """The operators in float32. A subclass changes `product` to round the inputs of products."""

    def product(self, x: Tensor, matrix: Matrix) -> Tensor:
        """Return `x` `[..., K]` times the transposed matrix `[N, K]`."""
        return F.linear(x, as_floats(matrix))

    def linear(self, x: Tensor, matrix: NbitMatrix, bias: Tensor | None) -> Tensor:
        """Return the result of `lfm::linear_nbits`."""
        y = self.product(x, matrix)
        return y if bias is None else y + bias

    def moe(
        self,
        x: Tensor,
        scores: Tensor,
        choice: Tensor,
        w1: Sequence[Matrix],
        w3: Sequence[Matrix],
        w2: Sequence[Matrix],
        top_k: int,
        normalize: bool,
        scale: float,
    ) -> Tensor:
        """Return the result of `lfm::moe`; an expert runs only on the tokens that chose it."""
        experts, weights = choose_experts(scores, choice, top_k, normalize, scale)
        y = torch.zeros_like(x)
        for index, (gate, up, down) in enumerate(zip(w1, w3, w2, strict=True)):
            tokens, slots = torch.where(experts == index)
            if len(tokens):
                output = self.expert(tokens, x[tokens], gate, up, down)
                y.index_add_(0, tokens, output * weights[tokens, slots].unsqueeze(-1))
        return y

    def expert(self, tokens: Tensor, x: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> Tensor:
        """Return the output `[n, H]` of one expert for the rows `x`; `tokens` are their indices."""
        return self.product(F.silu(self.product(x, gate)) * self.product(x, up), down)

    def call(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of a node; `args` contain an `NbitMatrix` for each dequantize call."""
        if node.target is torch.ops.lfm.moe.default:
            return self.moe(*args, **kwargs)
        values = [as_floats(a) if isinstance(a, NbitMatrix) else a for a in args]
        return node.target(*values, **kwargs)  # type: ignore[operator]


def has_nbit_matrix(node: fx.Node) -> bool:
    """Return whether a node is a call of `linear_nbits` or `dequantize`."""
    ops = torch.ops.lfm
    return node.target in (ops.linear_nbits.default, ops.dequantize.default)


def read_matrix(program: Program, node: fx.Node) -> NbitMatrix:
    """Return the matrix of a `linear_nbits` or `dequantize` call of a bound program."""
    arguments: list[Any] = list(node.args)
    if node.target is torch.ops.lfm.linear_nbits.default:
        _, *arguments = arguments
        del arguments[3]  # the bias
    tensors, numbers = arguments[:3], arguments[3:]
    codes, scales, zeros = (
        None if constant is None else program.constant(str(constant.target)) for constant in tensors
    )
    assert codes is not None
    assert scales is not None
    return NbitMatrix(codes, scales, zeros, *numbers)
