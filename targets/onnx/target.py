"""The ONNX target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lfmc.calib_free.grid.formats import Capabilities, Format, unpadded_formats
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.trace import TraceSpec
from lfmc.model import DecoderConfig
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Rung
from lfmc.run.conversation import ConversationModel
from lfmc.run.stepper import Stepper
from lfmc.targets.base import (
    DEFAULT_OPTIONS,
    Artifact,
    Request,
    StoredTensor,
    TargetOption,
    require,
)
from lfmc.targets.memory import streamed_nbytes
from lfmc.targets.shared.rounding_noise import has_nbit_products, noise_rung

# Bit widths of QMoE and MatMulNBits on CPU. Others fail when a session starts (onnxruntime 1.31).
BITS = (2, 4, 8)
GROUPS = (32, 64, 128)
FORMATS = tuple(
    Format(bits, group, symmetric, "float16")
    for bits in BITS
    for group in GROUPS
    for symmetric in (True, False)
)

# Without `Cast` of 16-bit constants and zero points of experts, which WebGPU refuses, and 2-bit
# experts, which it does not have.
WEB_FORMATS = tuple(replace(f, scale_dtype="float32") for f in FORMATS)
WEB_EXPERT_FORMATS = tuple(f for f in WEB_FORMATS if f.symmetric and f.bits > 2)

# Level 4 rounds the activations of n-bit matmuls to int8, which the fast kernels need. Level 0
# keeps them float; a step then takes 3 times as long at 4 bits and 100 times at 2 and 8 bits.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class OnnxTarget:
    """ONNX Runtime on CPU, with its contrib operators."""

    name: ClassVar[str] = "onnx"
    extra: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxruntime")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption(
            "layout", ("plain", "genai", "transformers.js"), "which runtime's naming to use"
        ),
    )

    exact: ClassVar[bool] = True

    def capabilities(
        self, config: DecoderConfig, options: Mapping[str, str] = DEFAULT_OPTIONS
    ) -> Capabilities:
        moe, web = config.moe, options.get("layout") == "transformers.js"
        formats, experts = (WEB_FORMATS, WEB_EXPERT_FORMATS) if web else (FORMATS, FORMATS)
        return Capabilities(
            linear=formats,
            # These two kernels support whole groups only. MatMulNBits pads the last group.
            embedding=unpadded_formats(formats, config.hidden_size),
            expert=unpadded_formats(experts, config.hidden_size, moe.ffn_size) if moe else (),
            floats=("float32",) if web else ("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="expert",  # a QMoE node has one bit width for all three matrices
            expert_layer_shares_group=True,  # so a layer needs one node per width, not per format
            negative_scales=True,
            graph_nbytes=_graph_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        for package in self.packages:
            require(package, self.extra)
        layout = request.options["layout"]
        if layout == "genai" and config.model_type == "lfm3":
            raise UnsupportedError(
                "layout 'genai' does not support this model",
                expected="lfm2 or lfm2_moe",
                got=config.model_type,
                todo="onnxruntime-genai 0.18 does not support lfm3; use -O layout=plain or "
                "transformers.js",
            )

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return streamed_nbytes(config, is_float=is_float)

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        return {}

    def why_not_here(self, request: Request) -> str | None:
        return None

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        # Batch and length are dynamic. The cache of attention has no slots: the context only
        # determines the size of the rotary tables.
        return TraceSpec(context=request.context, batch=None, length=None)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.onnx.emitter import CONTEXT_KEY, OPSETS, Emitter
        from lfmc.targets.onnx.genai import CONFIG_FILE, genai_config
        from lfmc.targets.onnx.handlers import HANDLERS
        from lfmc.targets.onnx.layouts import Layout
        from lfmc.targets.onnx.lower import Lowering
        from lfmc.targets.onnx.transformers_js import NOT_ON_WEBGPU, settings

        layout = Layout(request.options["layout"])
        emitter = Emitter(folder, layout.model_file, layout.data_file)
        lowering = Lowering(
            program, weights, layout, request.context, ACCURACY_LEVEL, emitter, HANDLERS
        )
        lowering.run()
        emitter.save(program.config.model_type, {CONTEXT_KEY: json.dumps(request.context)})
        files = [layout.model_file, layout.data_file]
        if layout.name == "genai":
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
                "reset": "zeros" if state.kind == "conv" else "empty",
            }
            for state in program.states
        ]
        facts = {
            "opsets": OPSETS,
            "accuracy_level": ACCURACY_LEVEL,
            "runs_on": {"CPUExecutionProvider": 1.0},  # the only provider that the session enables
            "inputs": emitter.describe(emitter.inputs),
            "outputs": emitter.describe(emitter.outputs),
            "states": states,
        }
        if layout.runs_in_browsers:
            facts["not_on_webgpu"] = NOT_ON_WEBGPU if program.config.moe else None
        return Artifact(
            tuple(files),
            tuple(emitter.stored),
            lowering.probes(),
            facts,
            settings=settings(weights.checkpoint) if layout.runs_in_browsers else {},
        )

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.onnx.readback import read_initializer

        return read_initializer(folder, stored.name)

    def stored_tokens(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Return the token ids of genai's configuration file, if the layout has one."""
        from lfmc.targets.onnx.genai import CONFIG_FILE, read_token_ids

        path = folder / CONFIG_FILE
        return {CONFIG_FILE: read_token_ids(path.read_text("utf-8"))} if path.is_file() else {}

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.onnx.runtime import OnnxStepper

        return OnnxStepper(folder, exact=exact)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        from lfmc.reference.layerwise_program import LayerwiseProgram
        from lfmc.targets.onnx.activations import KernelOperators
        from lfmc.targets.onnx.runtime import experts_are_exact

        exact_experts = exact or experts_are_exact(folder)
        operators = KernelOperators(exact=exact, exact_experts=exact_experts)
        return LayerwiseProgram(program, request.context, operators)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        from lfmc.targets.onnx.activations import rounds_always

        return ARTIFACT_TOLERANCE if exact and not rounds_always(program) else None

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Compare every n-bit operator in isolation, and then the whole artifact."""
        from lfmc.reference.layerwise_program import LayerwiseProgram
        from lfmc.targets.onnx.activations import KernelOperators
        from lfmc.targets.onnx.probe import operator_parity
        from lfmc.targets.onnx.runtime import experts_are_exact

        operators = operator_parity(program, folder, artifact)
        if not has_nbit_products(program):
            return (operators,)
        stepper = self.run(folder)
        kernels = KernelOperators(exact=False, exact_experts=experts_are_exact(folder))
        rounded = LayerwiseProgram(program, stepper.context, kernels)
        return operators, noise_rung(program, rounded, stepper)


# Bytes of the model file other than weights: measured, with a margin. An export that needs more
# fails instead of exceeding its budget (`tests/targets/onnx/test_files.py` checks the margin).
GRAPH = 8_000
GRAPH_PER_LAYER = 8_500
GRAPH_PER_EXPERT = 300


def _graph_nbytes(config: DecoderConfig) -> int:
    experts = GRAPH_PER_EXPERT * config.total_num_experts
    return GRAPH + GRAPH_PER_LAYER * config.num_layers + experts
