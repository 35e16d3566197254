"""The MLIR target: its capabilities and its operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lfmc.calib_free.grid.formats import Capabilities, unpadded_formats
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
from lfmc.targets.mlir.devices import DEVICES, why_not_here
from lfmc.targets.shared.row_blocks import FORMATS, ROWS, require_whole_blocks

BYTECODE = "model.mlirbc"
DIALECTS = ("linalg", "torch", "stablehlo", "tosa")


@dataclass(frozen=True)
class MlirTarget:
    """MLIR by torch-mlir, compiled by IREE, with parameters in a separate file."""

    name: ClassVar[str] = "mlir"
    extra: ClassVar[str] = "mlir"
    packages: ClassVar[tuple[str, ...]] = ("torch_mlir", "iree.compiler", "iree.runtime")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("dialect", DIALECTS, "of the module written next to the compiled one"),
        TargetOption(
            "operators", ("lowered", "named"), "lowered, or kept by name (dialect torch only)"
        ),
        TargetOption(
            "device", tuple(DEVICES), "device that IREE compiles for; cpu: this machine's"
        ),
        TargetOption("chunk", ("64", "16", "32", "128"), "tokens per long call"),
    )
    exact: ClassVar[bool] = False

    def capabilities(
        self, config: DecoderConfig, options: Mapping[str, str] = DEFAULT_OPTIONS
    ) -> Capabilities:
        moe, hidden = config.moe, config.hidden_size
        inner = config.num_heads * config.head_dim
        return Capabilities(
            linear=unpadded_formats(FORMATS, hidden, config.ffn_size, inner),
            embedding=unpadded_formats(FORMATS, hidden),
            expert=unpadded_formats(FORMATS, hidden, moe.ffn_size) if moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="expert",  # each combination of formats in a layer is gathered separately
            expert_layer_shares_group=True,
            negative_scales=True,
            graph_nbytes=_graph_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        for package in self.packages:
            require(package, self.extra)
        device, dialect = (request.options[name] for name in ("device", "dialect"))
        if request.options["operators"] == "named" and dialect != "torch":
            raise UnsupportedError(
                f"dialect {dialect} does not support named operators", todo="-O dialect=torch"
            )
        if DEVICES[device].words and dialect in ("stablehlo", "tosa"):
            raise UnsupportedError(
                f"{device} reads 32-bit words, and {dialect} has no shifts to unpack them",
                todo="-O dialect=linalg",
            )
        sizes = {
            "vocabulary": config.vocab_size,
            "hidden size": config.hidden_size,
            "size of a key or value projection": config.num_kv_heads * config.head_dim,
            "size of the feed-forward": config.ffn_size,
            "size of an expert": config.moe.ffn_size if config.moe else config.ffn_size,
        }
        # 3-bit zero points fill whole words only if the number of blocks is even.
        require_whole_blocks(sizes, 2 * ROWS if DEVICES[device].words else ROWS)

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return streamed_nbytes(config, is_float=is_float)

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        return {}

    def why_not_here(self, request: Request) -> str | None:
        return why_not_here(DEVICES[request.options["device"]])

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        return TraceSpec(context=request.context, batch=1, length=None)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.mlir.dialects import write_bytecode
        from lfmc.targets.mlir.graphs import state_shape
        from lfmc.targets.mlir.iree import add_host_functions, compile_module
        from lfmc.targets.mlir.lower import Lowering
        from lfmc.targets.mlir.rewrites import prepare_for_iree
        from lfmc.targets.mlir.runtime import MODULE
        from lfmc.targets.shared.code_object import check_code_objects
        from lfmc.targets.shared.parameters_file import PARAMETERS, write

        chunk = min(int(request.options["chunk"]), request.context)
        device, dialect = DEVICES[request.options["device"]], request.options["dialect"]
        named = request.options["operators"] == "named"
        lowering = Lowering(program, weights, chunk, dialect, device, named=named)
        module = lowering.module()
        write_bytecode(module, folder / BYTECODE)
        lowering.to_linalg(module)
        prepare_for_iree(module, device)
        compile_module(add_host_functions(module, lowering.graphs), device, folder / MODULE)
        graphs = lowering.graphs
        states = [
            {
                "name": f"{spec.kind}_{spec.layer}",
                "shape": list(state_shape(spec)),
                "dtype": "float32",
                "kept_by": "the compiled module; of model.mlirbc, the caller",
                "reset": "zeros",
            }
            for spec in program.states
        ]
        code_objects = None
        if device.arch:
            code_objects = check_code_objects(
                folder / MODULE, device.arch, device.wave, self.extra, may_spill=True
            )
        facts: dict[str, Any] = {
            "device": device.name,
            "code_objects": code_objects,
            "dialect": dialect,
            "operators": request.options["operators"],
            "chunk": chunk,
            "lengths": sorted({function.tokens for function in graphs.functions}, reverse=True),
            "functions": [function.name for function in graphs.functions],
            "states": states,
        }
        parameters_facts = {
            **facts,
            "context": request.context,
            "vocab_size": program.config.vocab_size,
            "parameters": [parameter.name for parameter in graphs.parameters],
            "prepare": [parameter.name for parameter in graphs.packed],
        }
        write(folder / PARAMETERS, graphs.parameters, parameters_facts)
        stored = tuple(lowering.constants.stored)
        return Artifact((MODULE, PARAMETERS), stored, facts=facts, beside=(BYTECODE,))

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.mlir.constants import read

        return read(folder, stored)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.mlir.runtime import IreeStepper

        return IreeStepper(folder)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        from lfmc.reference.layerwise_program import LayerwiseProgram

        return LayerwiseProgram(program, request.context)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return ARTIFACT_TOLERANCE

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Return no rung: nothing is rounded, so the parity matrix compares exact arithmetic."""
        return ()


# Bytes of the compiled module, which grow with the number of formats. Measured, with a margin.
GRAPH = 250_000
GRAPH_PER_LAYER = 25_000
GRAPH_OF_EXPERTS = 150_000
GRAPH_PER_EXPERT = 14_000  # per layer, for at most MAX_EXPERTS experts: there are fewer formats
MAX_EXPERTS = 16


def _graph_nbytes(config: DecoderConfig) -> int:
    moe = config.moe
    layers = config.total_num_experts // moe.num_experts if moe else 0
    per_layer = GRAPH_PER_EXPERT * min(moe.num_experts, MAX_EXPERTS) if moe else 0
    experts = GRAPH_OF_EXPERTS + per_layer * layers if layers else 0
    return GRAPH + GRAPH_PER_LAYER * config.num_layers + experts
