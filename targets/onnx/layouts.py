"""State names and shapes, and the names of files, for each runtime that loads the model.

| layout | convolution state | read by |
|---|---|---|
| `plain` | `past_conv.N` `[B, taps - 1, H]`, as in the kernel | your own code, lfmc |
| `genai` | `past.N.conv` `[B, H, taps - 1]` | onnxruntime-genai |
| `transformers.js` | `past_conv.N` `[B, H, taps]`, one column unused | transformers.js |
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lfmc.model import StateSpec
from lfmc.targets.onnx.emitter import (
    CONTRIB,
    DATA_FILE,
    MODEL_FILE,
    WEB_DATA_FILE,
    WEB_MODEL_FILE,
    Emitter,
)

TRANSFORMERS_JS = "transformers.js"


@dataclass(frozen=True)
class Layout:
    """The names and shapes that one runtime expects."""

    name: str

    @property
    def runs_in_browsers(self) -> bool:
        """Whether the graph is limited to operators and inputs that browsers' runtimes have."""
        return self.name == TRANSFORMERS_JS

    @property
    def model_file(self) -> str:
        return WEB_MODEL_FILE if self.runs_in_browsers else MODEL_FILE

    @property
    def data_file(self) -> str:
        return WEB_DATA_FILE if self.runs_in_browsers else DATA_FILE

    @property
    def batch(self) -> str:
        """The name of the batch dim. transformers.js takes any dim of another name as 0."""
        return "batch_size" if self.runs_in_browsers else "batch"

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
        """Return the dims of a state; `time` names the dim that grows."""
        if state.kind != "conv":
            _, heads, _, head_dim = state.shape
            return [self.batch, heads, time, head_dim]
        _, channels, taps = state.shape
        if self.name == "plain":
            return [self.batch, taps, channels]
        return [self.batch, channels, taps + self.runs_in_browsers]

    def conv(
        self,
        emitter: Emitter,
        x: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        past: ir.Value,
        taps: int,
    ) -> tuple[ir.Value, ir.Value]:
        """Return the causal convolution of `x` `[B, T, H]`, and the new state in this layout.

        The filter reads `taps` earlier inputs.
        """
        kernel_state = past
        if self.runs_in_browsers:
            kernel_state = emitter.op(
                "Slice", past, emitter.ints(1), emitter.ints(taps + 1), emitter.ints(2)
            )
        if self.name != "plain":
            kernel_state = emitter.op("Transpose", kernel_state, perm=[0, 2, 1])
        y, present = emitter.ops(
            2,
            "CausalConvWithState",
            x,
            weight,
            bias,
            kernel_state,
            domain=CONTRIB,
            activation="none",
            channels_last=1,
            ndim=1,
        )
        if self.name == "genai":
            present = emitter.op("Transpose", present, perm=[0, 2, 1])
        if self.runs_in_browsers:
            inputs = emitter.op("Concat", past, emitter.op("Transpose", x, perm=[0, 2, 1]), axis=2)
            last = (emitter.ints(-taps - 1), emitter.ints(2**62), emitter.ints(2))
            present = emitter.op("Slice", inputs, *last)
        return y, present
