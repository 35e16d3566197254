"""Names of inputs and outputs, and the shape of the convolution state, for who loads the model.

| layout | convolution state | read by |
|---|---|---|
| `plain` | `past_conv.N` `[B, taps - 1, H]`, as the kernel has it | your own code, lfmc |
| `genai` | `past.N.conv` `[B, H, taps - 1]` | onnxruntime-genai |
| `transformers.js` | `past_conv.N` `[B, H, taps]`, one column more than is read | transformers.js |
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lfmc.model import StateSpec
from lfmc.targets.onnx.emitter import CONTRIB, Emitter


@dataclass(frozen=True)
class Layout:
    """How one reader of the model calls its states."""

    name: str

    def past(self, state: StateSpec) -> str:
        if state.kind != "conv":
            return f"past_key_values.{state.layer}.{state.kind}"
        return f"past.{state.layer}.conv" if self.name == "genai" else f"past_conv.{state.layer}"

    def present(self, state: StateSpec) -> str:
        if state.kind != "conv":
            return f"present.{state.layer}.{state.kind}"
        if self.name == "genai":
            return f"present.{state.layer}.conv"
        return f"present_conv.{state.layer}"

    def shape(self, state: StateSpec, time: str) -> list[int | str]:
        """Dims of a state's tensor; `time` names the dim that grows."""
        if state.kind != "conv":
            _, heads, _, head_dim = state.shape
            return ["batch", heads, time, head_dim]
        _, channels, taps = state.shape
        if self.name == "plain":
            return ["batch", taps, channels]
        return ["batch", channels, taps + (self.name == "transformers.js")]

    def conv(
        self,
        emit: Emitter,
        x: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        past: ir.Value,
        taps: int,
    ) -> tuple[ir.Value, ir.Value]:
        """The causal convolution of `x` `[B, T, H]`, and the new state in this layout.

        `taps` is how many earlier inputs the filter reads.
        """
        inner = past
        if self.name == "transformers.js":
            inner = emit.op("Slice", past, emit.ints(1), emit.ints(taps + 1), emit.ints(2))
        if self.name != "plain":
            inner = emit.op("Transpose", inner, perm=[0, 2, 1])
        y, present = emit.ops(
            2,
            "CausalConvWithState",
            x,
            weight,
            bias,
            inner,
            domain=CONTRIB,
            activation="none",
            channels_last=1,
            ndim=1,
        )
        if self.name == "genai":
            present = emit.op("Transpose", present, perm=[0, 2, 1])
        if self.name == "transformers.js":
            seen = emit.op("Concat", past, emit.op("Transpose", x, perm=[0, 2, 1]), axis=2)
            last = (emit.ints(-taps - 1), emit.ints(2**62), emit.ints(2))
            present = emit.op("Slice", seen, *last)
        return y, present
