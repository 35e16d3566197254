"""The graphs in torch behind the calls of a plain program, which parity makes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.targets.npu.forms import Forms, Given, Keep, Style
from lfmc.targets.npu.host import Embed
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.run_program import run_program


class Rounded(nn.Module):
    """`(tokens [1, T], positions [T], *states) -> (logits, *states)`, states as a program has them
    and every value kept by `keep`."""

    def __init__(
        self,
        program: Program,
        interface: Interface,
        given: Given,
        embed: Embed,
        keep: Keep,
        style: Style,
    ) -> None:
        super().__init__()
        self._program, self._interface = program, interface
        self._given, self._embed, self._keep, self._style = given, embed, keep, style

    def forward(self, tokens: Tensor, positions: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        interface = self._interface.of_tokens(len(positions))
        inputs = {"hidden": self._embed(tokens[0])[None], **interface.tables(int(positions[0]))}
        for spec, state in zip(interface.states, states, strict=True):
            flat = state if spec.kind == "conv" else state[0]
            inputs[spec.identifier] = flat.transpose(1, 2) if spec.kind == "key" else flat
        forms = Forms(self._program, interface, self._given, self._keep, self._style)
        made = run_program(forms, inputs)
        after = []
        for spec, state in zip(interface.states, states, strict=True):
            new = made[f"{spec.identifier}_new"]
            if spec.kind == "conv":
                after.append(torch.cat([state, new], 2)[..., -state.shape[2] :])
                continue
            rows = new.transpose(1, 2) if spec.kind == "key" else new
            after.append(state.index_copy(2, positions, rows[None]))
        return made["logits"], *after
