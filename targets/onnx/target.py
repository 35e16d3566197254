"""The ONNX target: capabilities and verbs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Capabilities, Format, unpadded
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.trace import TraceSpec
from lfmc.model import DecoderConfig
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Rung
from lfmc.run.stepper import Stepper
from lfmc.targets.base import Artifact, Request, StoredTensor, TargetOption, require
from lfmc.targets.shared.rounding_noise import n_bit, noise_rung

# QMoE's and MatMulNBits' widths on CPU; others fail when a session starts (onnxruntime 1.31).
BITS = (2, 4, 8)
GROUPS = (32, 64, 128)
FORMATS = tuple(
    Format(bits, group, symmetric, "float16")
    for bits in BITS
    for group in GROUPS
    for symmetric in (True, False)
)


# 4 rounds activations to int8 in n-bit matmuls, which their fast kernels want; 0 keeps them float,
# at 3 times the time of a step at 4 bits and 100 times at 2 and 8.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class OnnxTarget:
    """ONNX Runtime on CPU, through its contrib operators."""

    name: ClassVar[str] = "onnx"
    extra: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxruntime")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption(
            "layout", ("plain", "genai", "transformers.js"), "names of inputs and states, by reader"
        ),
    )

    lowering_bytes: ClassVar[float] = 2.5
    exact: ClassVar[bool] = True

    def capabilities(self, config: DecoderConfig) -> Capabilities:
        moe = config.moe
        return Capabilities(
            linear=FORMATS,
            # These two kernels take whole groups only; MatMulNBits pads the last one.
            embedding=unpadded(FORMATS, config.hidden_size),
            expert=unpadded(FORMATS, config.hidden_size, moe.ffn_size) if moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="expert",  # one QMoE node has one width for all three matrices
            expert_layer_shares_group=True,  # so a layer needs a node a width, not a format
            negative_scales=True,
            graph_nbytes=_graph_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        for package in self.packages:
            require(package, self.extra)
        layout = request.options["layout"]
        if layout != "plain" and config.model_type == "lfm3":
            raise UnsupportedError(
                f"layout '{layout}' can't carry this model",
                expected="lfm2 or lfm2_moe",
                got=config.model_type,
                todo="neither onnxruntime-genai 0.18 nor transformers.js knows lfm3; "
                "use -O layout=plain",
            )

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        return {}

    def why_not_here(self, request: Request) -> str | None:
        return None

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        # Batch and length stay open. Attention's own cache has no slots; the context only sizes
        # the rotary tables.
        return TraceSpec(context=request.context, batch=None, length=None)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.onnx.emitter import CONTEXT_KEY, DATA_FILE, MODEL_FILE, OPSETS, Emitter
        from lfmc.targets.onnx.genai import CONFIG_FILE, genai_config
        from lfmc.targets.onnx.handlers import HANDLERS
        from lfmc.targets.onnx.layouts import Layout
        from lfmc.targets.onnx.lower import Lowering

        layout = Layout(request.options["layout"])
        emit = Emitter(folder)
        lowering = Lowering(
            program, weights, layout, request.context, ACCURACY_LEVEL, emit, HANDLERS
        )
        lowering.run()
        emit.save(program.config.model_type, {CONTEXT_KEY: json.dumps(request.context)})
        files = [MODEL_FILE, DATA_FILE]
        if request.options["layout"] == "genai":
            text = genai_config(weights.checkpoint, request.context)
            (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
            files.append(CONFIG_FILE)
        states = [
            {
                "name": state.name,
                "input": layout.past(state),
                "output": layout.present(state),
                "shape": layout.shape(state, "past"),
                "dtype": "float32",
                "reset": "zeros; keys and values of length 0",
            }
            for state in program.states
        ]
        facts = {
            "opsets": OPSETS,
            "accuracy_level": ACCURACY_LEVEL,
            "runs_on": {"CPUExecutionProvider": 1.0},  # the only provider that the runtime is given
            "states": states,
        }
        return Artifact(tuple(files), tuple(emit.stored), lowering.probes(), facts)

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.onnx.readback import read_initializer

        return read_initializer(folder, stored.name)

    def stored_tokens(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Of genai's configuration, where the layout has one."""
        from lfmc.targets.onnx.genai import CONFIG_FILE, told_tokens

        path = folder / CONFIG_FILE
        return {CONFIG_FILE: told_tokens(path.read_text("utf-8"))} if path.is_file() else {}

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.onnx.runtime import OnnxStepper

        return OnnxStepper(folder, exact=exact)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> torch.nn.Module:
        from lfmc.targets.onnx.activations import KernelReference

        return KernelReference(program.module, exact=exact)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        from lfmc.targets.onnx.activations import rounds_always

        return ARTIFACT_TOLERANCE if exact and not rounds_always(program) else None

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Every n-bit operator on the inputs that it has in the artifact; then all together."""
        from lfmc.targets.onnx.activations import KernelReference
        from lfmc.targets.onnx.probe import operator_parity

        alone = operator_parity(program, folder, artifact)
        if not n_bit(program):
            return (alone,)
        alike = KernelReference(program.module, exact=False)
        return alone, noise_rung(program, alike, self.run(folder))


# Bytes of the model file that are not weights: measured, with a margin; an export that needs more
# fails instead of breaking its budget (`tests/targets/onnx/test_files.py` watches the margin).
GRAPH = 8_000
GRAPH_PER_LAYER = 8_500
GRAPH_PER_EXPERT = 300


def _graph_nbytes(config: DecoderConfig) -> int:
    experts = GRAPH_PER_EXPERT * config.num_experts_in_all
    return GRAPH + GRAPH_PER_LAYER * config.num_layers + experts
