"""The Core ML target."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from torch import Tensor

from lfmc.calib_free.grid.formats import Capabilities, Format, unpadded_formats
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.trace import TraceSpec
from lfmc.machine.quiet import quiet
from lfmc.model import DecoderConfig
from lfmc.model.config import CONV
from lfmc.parity.compare import Rung
from lfmc.run.conversation import ConversationModel
from lfmc.run.stepper import Stepper
from lfmc.targets.base import DEFAULT_OPTIONS, Artifact, Request, StoredTensor, TargetOption
from lfmc.targets.coreml.states import DIGIT, LAYOUTS, package_states
from lfmc.targets.memory import streamed_nbytes, whole_nbytes

# constexpr_blockwise_shift_scale: int4 and int8 without an offset, uint4 and uint8 with one.
GRIDS = tuple(
    Format(bits, group, symmetric, "float16")
    for bits in (4, 8)
    for group in (32, 64, 128)
    for symmetric in (True, False)
)
# constexpr_lut_to_dense with a table per row. (It supports 4 and 8 bits, but takes more bytes.)
PALETTES = tuple(Format(bits, 0, True, "float16") for bits in (2, 3, 6))
FORMATS = (*PALETTES, *GRIDS)  # blocks can't be padded
# One format per bit width, so that the experts of a layer are few stacks.
EXPERTS = (*PALETTES, Format(4, 32, False, "float16"), Format(8, 128, True, "float16"))
COMPUTE_UNITS = ("CPU_AND_GPU", "CPU_AND_NE", "ALL", "CPU_ONLY")
ROWS = 16_384  # the Neural Engine was reported to support no larger dim
INTERPRETER_BYTES = 7.0  # of memory per parameter: all matrices, as integers and as float16
TOLERANCE = 2e-3  # of the logit scale, in float32 arithmetic


@dataclass(frozen=True)
class CoremlTarget:
    """Core ML on iOS 18, macOS 15 and later: an ML program with two functions."""

    name: ClassVar[str] = "coreml"
    extra: ClassVar[str] = "coreml"
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("layout", LAYOUTS, "whether Core ML or the app stores the filters' states"),
        TargetOption(
            "chunk", ("64", "16", "32", "128", "256", "512"), "tokens per call of prefill"
        ),
        TargetOption(
            "experts", ("chosen", "dense"), "whether decode computes the chosen experts or all"
        ),
        TargetOption(
            "tall", ("whole", "split"), f"how to store matrices of more than {ROWS:,} rows"
        ),
        TargetOption(
            "compute_units", COMPUTE_UNITS, "the compute units that an app should request"
        ),
    )

    exact: ClassVar[bool] = True

    def capabilities(
        self, config: DecoderConfig, options: Mapping[str, str] = DEFAULT_OPTIONS
    ) -> Capabilities:
        moe, hidden = config.moe, config.hidden_size
        inner = config.num_heads * config.head_dim
        return Capabilities(
            linear=unpadded_formats(FORMATS, hidden, config.ffn_size, inner),
            embedding=unpadded_formats(FORMATS, hidden),
            expert=unpadded_formats(EXPERTS, hidden, moe.ffn_size) if moe else (),
            floats=("float32", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            negative_scales=True,
            graph_nbytes=_graph_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        from lfmc.targets.coreml.library import coremltools

        coremltools()

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return max(
            streamed_nbytes(config, is_float=is_float),
            whole_nbytes(config, INTERPRETER_BYTES, is_float=is_float),
        )

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        return {}

    def why_not_here(self, request: Request) -> str | None:
        return None

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        return TraceSpec(context=request.context, batch=1, length=None)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.coreml.library import coremltools

        ct = coremltools()
        from lfmc.targets.coreml.constants import Constants
        from lfmc.targets.coreml.handlers import HANDLERS
        from lfmc.targets.coreml.known_issues import known_troubles
        from lfmc.targets.coreml.lower import Lowering, LoweringOptions
        from lfmc.targets.coreml.names import DECODE, FACTS_KEY, PREFILL
        from lfmc.targets.coreml.package import PACKAGE, About, write_package

        options = request.options
        states = package_states(program.states, options["layout"])
        with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
            constants = Constants(Path(scratch))
            chunk = min(int(options["chunk"]), request.context)
            lowering_options = LoweringOptions(
                options["experts"] == "dense", ROWS if options["tall"] == "split" else None
            )
            functions, lowerings = {}, {}
            for name, tokens in ((DECODE, 1), (PREFILL, chunk)):
                lowering = Lowering(
                    program,
                    weights,
                    states,
                    request.context,
                    tokens,
                    name == PREFILL,
                    constants,
                    lowering_options,
                    HANDLERS,
                )
                with quiet():
                    functions[name] = lowering.run(ct.target.iOS18)
                lowerings[name] = lowering
            runtime_facts = {
                "context": request.context,
                "chunk": chunk,
                "vocab_size": program.config.vocab_size,
                "chosen": lowerings[DECODE].choice_names,
            }
            checkpoint = weights.checkpoint
            about = About(
                f"{checkpoint.name} ({program.config.model_type}), "
                f"{weights.plan.bits_per_weight:.2f} bits per weight, exported by lfmc",
                author=f"the authors of {checkpoint.base_model}",
                license=str(checkpoint.license),
            )
            metadata = {FACTS_KEY: json.dumps(runtime_facts)}
            files = write_package(functions, folder, about, DESCRIPTIONS, metadata, constants.names)
        facts = {
            "package": PACKAGE,
            "functions": {DECODE: 1, PREFILL: chunk},
            "minimum_deployment_target": "iOS18",
            "compute_units": options["compute_units"],
            "known_troubles": known_troubles(
                ct.__version__, map(weights.format, weights.checkpoint.tensors), states
            ),
            "states": [
                {
                    "name": state.name,
                    "shape": list(state.shape),
                    "dtype": "float16",
                    "kept_by": "MLState" if state.in_mlstate else "caller",
                    "reset": "zeros",
                }
                for state in states
            ],
        }
        return Artifact(
            tuple(files), tuple(constants.stored), tuple(lowerings[DECODE].probes), facts
        )

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.coreml.package import read_constant

        return read_constant(folder, stored)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.coreml.interpreter import Interpreter
        from lfmc.targets.coreml.runtime import CoremlStepper

        return CoremlStepper(Interpreter(folder, exact=exact))

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        from lfmc.reference.layerwise_program import LayerwiseProgram

        return LayerwiseProgram(program, request.context)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return TOLERANCE if exact else None

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        from lfmc.targets.coreml.probe import operator_parity

        return (operator_parity(program, folder, artifact),)


DESCRIPTIONS = {
    "input_ids": "Token ids. What lies behind the valid ones is ignored.",
    "position": "How many tokens came before these.",
    "valid": "How many of the tokens count, from the first on.",
    "logits": "For each token, the scores of what comes next.",
}

# Bytes of the operators of both functions and of the gaps between constants: measured, with a
# margin.
GRAPH_PER_ROPE = 12_000  # including its masks
GRAPH_PER_CONV, GRAPH_PER_ATTENTION = 19_000, 37_000
# In addition, with a norm after each block and a gate of the heads.
GRAPH_PER_SANDWICH = 6_000
# In addition, with a stack for every bit width.
GRAPH_PER_SPARSE, GRAPH_PER_EXPERT = 50_000, 400


def _graph_nbytes(config: DecoderConfig) -> int:
    """Return the bytes of a package other than the checkpoint's tensors."""
    total = GRAPH_PER_ROPE * len(config.rope) + _table_nbytes(config)
    for index, kind in enumerate(config.layer_types):
        total += GRAPH_PER_CONV if kind == CONV else GRAPH_PER_ATTENTION
        total += GRAPH_PER_SANDWICH if config.sandwich_norm else 0
        if config.moe and config.is_moe_layer(index):
            total += GRAPH_PER_SPARSE + GRAPH_PER_EXPERT * config.moe.num_experts
    return total


def _table_nbytes(config: DecoderConfig) -> int:
    """Return the bytes of constants outside of the checkpoint: rotary tables and zero biases."""
    digits = math.ceil(math.log(config.max_context, DIGIT))
    rotary = len(config.rope) * digits * DIGIT * config.head_dim * 4
    moe = config.moe.num_experts if config.moe else 0
    rows = config.vocab_size + 4 * config.hidden_size + 2 * config.ffn_size + moe
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return rotary + 4 * (rows + heads)
