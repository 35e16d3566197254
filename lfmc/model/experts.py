"""Sparse experts with a sigmoid router and a selection bias."""

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
    """Return the experts `[N, k]` (int64) with the highest `choice` `[N, E]`, and their weights.

    The weights `[N, k]` come from `scores` `[N, E]`. `normalize` divides the weights by their sum
    plus 1e-6, as transformers does.
    """
    _, expert_ids = torch.topk(choice, top_k, dim=-1)
    weights = scores.gather(1, expert_ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return expert_ids, weights * scale


def mix_experts(
    x: Tensor,
    shares: Tensor,
    w1: Sequence[Any],
    w3: Sequence[Any],
    w2: Sequence[Any],
    product: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:
    """Run every expert on every token `x` `[N, H]` and sum the outputs, weighted by `shares`.

    `shares` `[N, E]` is 0 for experts that a token did not choose. `product(x, matrix)` multiplies
    by one element of `w1`, `w3` or `w2`, in any representation.
    """
    results = []
    for index, (gate, up, down) in enumerate(zip(w1, w3, w2, strict=True)):
        inner = F.silu(product(x, gate)) * product(x, up)
        results.append(product(inner, down) * shares[:, index : index + 1])
    return reduce(torch.add, results)


class Router(nn.Module):
    """The router's weight `[E, H]`; a separate module to match the names in the checkpoint."""

    def __init__(self, num_experts: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size))


class SparseMoe(nn.Module):
    """Runs every expert on every token, with weight 0 for experts that a token did not choose.

    So all shapes are static, which every exporter needs. The pass `route-experts` replaces the
    block by `lfm::moe`, which runs only the chosen experts. `only_chosen` runs only the chosen
    experts here, too; its shapes depend on the data, so it can't be traced.
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
        """Return experts `[N, k]` (int64) and their weights `[N, k]` for tokens `x` `[N, H]`.

        The bias affects the choice, not the weights (Wang et al. 2024, loss-free balancing).
        """
        scores = torch.sigmoid(F.linear(x, self.gate.weight))
        choice = scores + self.expert_bias if self.moe.use_bias else scores
        moe = self.moe
        return choose_experts(scores, choice, moe.top_k, moe.normalize, moe.scale)

    def run_chosen(
        self, x: Tensor, on_rows: Callable[[Tensor], None] = lambda rows: None
    ) -> Tensor:
        """Return the outputs `[N, H]` of tokens `x` `[N, H]`; experts run on their tokens only.

        Before each expert runs, `on_rows` is called with the indices of its tokens, int64 `[n]`,
        ascending.
        """
        expert_ids, weights = self.route(x)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = (expert_ids == index).nonzero(as_tuple=True)
            on_rows(rows)
            output = expert(x.index_select(0, rows)) * weights[rows, slots].unsqueeze(1)
            y = y.index_add(0, rows, output)
        return y

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)  # (N, H)
        if self.only_chosen:
            return self.run_chosen(flat).view_as(x)
        expert_ids, weights = self.route(flat)
        y = torch.zeros_like(flat)
        shares = flat.new_zeros(flat.shape[0], self.moe.num_experts).scatter(1, expert_ids, weights)
        for index, expert in enumerate(self.experts):
            y = y + expert(flat) * shares[:, index : index + 1]
        return y.view_as(x)
