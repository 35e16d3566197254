"""The accelerator's graphs in torch, with the call signature of the traced program."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmc.graph.program import Program
from lfmc.targets.npu.forms import Forms, ReadConstant, RoundValue, Style
from lfmc.targets.npu.host import Embed
from lfmc.targets.npu.interface import Interface
from lfmc.targets.npu.run_program import run_program


class RoundedReference(nn.Module):
    """`(tokens [1, T], positions [T], *states) -> (logits, *states)`.

    The states have the program's layout. `round_value` rounds every value.
    """

    def __init__(
        self,
        program: Program,
        interface: Interface,
        read_constant: ReadConstant,
        embed: Embed,
        round_value: RoundValue,
        style: Style,
    ) -> None:
        super().__init__()
        self._program, self._interface = program, interface
        self._read_constant, self._embed = read_constant, embed
        self._round_value, self._style = round_value, style

    def forward(self, tokens: Tensor, positions: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        interface = self._interface.with_tokens(len(positions))
        inputs = {"hidden": self._embed(tokens[0])[None], **interface.tables(int(positions[0]))}
        for spec, state in zip(interface.states, states, strict=True):
            unbatched = state if spec.kind == "conv" else state[0]
            inputs[spec.identifier] = unbatched.transpose(1, 2) if spec.kind == "key" else unbatched
        forms = Forms(self._program, interface, self._read_constant, self._round_value, self._style)
        outputs = run_program(forms, inputs)
        new_states = []
        for spec, state in zip(interface.states, states, strict=True):
            new = outputs[f"{spec.identifier}_new"]
            if spec.kind == "conv":
                new_states.append(torch.cat([state, new], 2)[..., -state.shape[2] :])
                continue
            rows = new.transpose(1, 2) if spec.kind == "key" else new
            new_states.append(state.index_copy(2, positions, rows[None]))
        return outputs["logits"], *new_states
