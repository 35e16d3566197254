"""Sparse experts behind a sigmoid router with a selection bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfmc.model.config import DecoderConfig, Moe
from lfmc.model.mlp import GatedMlp


def choose_experts(
    scores: Tensor, choice: Tensor, top_k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Experts `[N, k]` (int64) with the highest `choice` `[N, E]`, and their weights `[N, k]` from
    `scores` `[N, E]`; `normalize` divides these by their sum plus 1e-6, as transformers does."""
    _, chosen = torch.topk(choice, top_k, dim=-1)
    weights = scores.gather(1, chosen)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return chosen, weights * scale


def mix_experts(
    x: Tensor,
    shares: Tensor,
    w1: Sequence[Any],
    w3: Sequence[Any],
    w2: Sequence[Any],
    product: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:
    """Every expert on every token `[N, H]`, mixed by `shares` `[N, E]`, 0 where not chosen.

    `product` multiplies by an expert's matrix, in whatever form `w1`, `w3` and `w2` have it.
    """
    results = []
    for index, (gate, up, down) in enumerate(zip(w1, w3, w2, strict=True)):
        inner = F.silu(product(x, gate)) * product(x, up)
        results.append(product(inner, down) * shares[:, index : index + 1])
    return reduce(torch.add, results)


class Router(nn.Module):
    """The router's weight `[E, H]`; a module of its own because the checkpoint names it so."""

    def __init__(self, num_experts: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size))


class SparseMoe(nn.Module):
    """Every expert on every token, weighted 0 where not chosen: static shapes for any exporter.

    Passes turn it into `lfm::moe`, which runs only the experts that were chosen. `only_chosen`
    does so here as well, with shapes that depend on the data: for running, not for tracing.
    """

    def __init__(self, config: DecoderConfig, moe: Moe) -> None:
        super().__init__()
        self.moe = moe
        self.only_chosen = False
        self.gate = Router(moe.num_experts, config.hidden_size)
        self.experts = nn.ModuleList(
            GatedMlp(config.hidden_size, moe.ffn_size) for _ in range(moe.num_experts)
        )
        if moe.use_bias:
            self.expert_bias = nn.Buffer(torch.empty(moe.num_experts))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Experts `[N, k]` (int64) and their weights `[N, k]` for tokens `x` `[N, H]`.

        The bias takes part in the choice and not in the weights (Wang et al. 2024, loss-free
        balancing).
        """
        scores = torch.sigmoid(F.linear(x, self.gate.weight))
        choice = scores + self.expert_bias if self.moe.use_bias else scores
        moe = self.moe
        return choose_experts(scores, choice, moe.top_k, moe.normalize, moe.scale)

    def run_chosen(self, x: Tensor, tell: Callable[[Tensor], None] = lambda rows: None) -> Tensor:
        """Outputs `[N, H]` of tokens `x` `[N, H]`, each expert run on those that chose it.

        `tell` is given which these are, int64 `[n]`, rising, before the expert runs.
        """
        chosen, weights = self.route(x)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            tell(rows)
            own = expert(x.index_select(0, rows)) * weights[rows, slots].unsqueeze(1)
            y = y.index_add(0, rows, own)
        return y

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # (N, H)
        if self.only_chosen:
            return self.run_chosen(flat).view_as(x)
        chosen, weights = self.route(flat)
        y = torch.zeros_like(flat)
        shares = flat.new_zeros(flat.shape[0], self.moe.num_experts).scatter(1, chosen, weights)
        for index, expert in enumerate(self.experts):
            y = y + expert(flat) * shares[:, index : index + 1]
        return y.view_as(x)
