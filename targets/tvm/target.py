"""The TVM target: its capabilities and methods."""

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
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Rung, skipped_rung
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
from lfmc.targets.shared.row_blocks import FORMATS, ROWS, require_whole_blocks
from lfmc.targets.tvm.devices import (
    Device,
    device_choices,
    find_device,
    missing_device_tools,
    reason_not_executable,
)
from lfmc.targets.tvm.gpus import GPUS, Gpu
from lfmc.targets.tvm.kernels.cpus import CPUS


@dataclass(frozen=True)
class TvmTarget:
    """TVM with lfmc's own kernels, compiled: a shared library and a parameters file."""

    name: ClassVar[str] = "tvm"
    extra: ClassVar[str] = "tvm"
    packages: ClassVar[tuple[str, ...]] = ("tvm",)
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption(
            "device",
            device_choices(),
            "the device of the library; cpu: the family of this machine",
        ),
        TargetOption(
            "chunk", ("256", "32", "64", "128", "512"), "largest number of tokens of a call"
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
            expert=unpadded_formats(FORMATS, hidden, moe.ffn_size) if moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            expert_layer_shares_group=True,
            negative_scales=True,
            graph_nbytes=_graph_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        require("tvm", self.extra)
        device = find_device(request.options["device"])
        if missing := missing_device_tools(device):
            raise UnsupportedError(
                f"nothing can be compiled for {device.name} on this machine",
                todo="install " + ", ".join(missing),
            )
        sizes = {
            "hidden size": config.hidden_size,
            "size of a head": config.head_dim,
            "size of the feed-forward": config.ffn_size,
            "size of an expert": config.moe.ffn_size if config.moe else ROWS,
        }
        require_whole_blocks(sizes)

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return streamed_nbytes(config, is_float=is_float)

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        devices: dict[str, Device] = {f"cpu:{name}": cpu for name, cpu in CPUS.items()}
        devices.update(GPUS)
        tools = {f"device={name}": missing_device_tools(device) for name, device in devices.items()}
        return {option: missing for option, missing in tools.items() if missing}

    def why_not_here(self, request: Request) -> str | None:
        return reason_not_executable(find_device(request.options["device"]))

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        return TraceSpec(context=request.context, batch=1, length=None)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.shared.code_object import check_code_objects
        from lfmc.targets.shared.parameters_file import PARAMETERS, write
        from lfmc.targets.tvm.compile import compile_library
        from lfmc.targets.tvm.lower import Lowering
        from lfmc.targets.tvm.relax_function import state_shape
        from lfmc.targets.tvm.runtime import LIBRARY

        device = find_device(request.options["device"])
        lowering = Lowering(program, weights, request.context, device)
        chunk = min(int(request.options["chunk"]), request.context)
        compile_library(lowering.library.module, device, chunk, folder / LIBRARY)
        states = [
            {
                "name": spec.identifier,
                "shape": list(state_shape(spec)),
                "dtype": "float32",
                "kept_by": "the app",
                "reset": "zeros",
            }
            for spec in program.states
        ]
        facts: dict[str, Any] = {
            "made_for": _host_requirements(device),
            "code_objects": None,
            "chunk": chunk,
            "functions": [spec.name for spec in lowering.functions],
            "states": states,
        }
        if isinstance(device, Gpu) and device.kind == "rocm":
            path, arch, wave = folder / LIBRARY, device.arch, device.wave
            facts["code_objects"] = check_code_objects(path, arch, wave, self.extra)
        header = {
            **facts,
            "context": request.context,
            "vocab_size": program.config.vocab_size,
            "parameters": [parameter.name for parameter in lowering.library.parameters],
            "operators": lowering.operators,
        }
        write(folder / PARAMETERS, lowering.library.parameters, header)
        return Artifact((LIBRARY, PARAMETERS), tuple(lowering.library.constants.stored), (), facts)

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.tvm.readback import read

        return read(folder, stored)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.tvm.runtime import TvmStepper

        return TvmStepper(folder, exact=exact)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        from lfmc.reference.layerwise_program import LayerwiseProgram
        from lfmc.targets.shared.rounded_operators import ROUNDED

        # GPUs do not round activations.
        on_gpu = isinstance(find_device(request.options["device"]), Gpu)
        return LayerwiseProgram(program, request.context, None if exact or on_gpu else ROUNDED)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return ARTIFACT_TOLERANCE if exact or not has_nbit_products(program) else None

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Compare every n-bit product on its inputs in the artifact, then all products together."""
        from lfmc.reference.layerwise_program import LayerwiseProgram
        from lfmc.targets.shared.parameters_file import open_parameters
        from lfmc.targets.shared.rounded_operators import ROUNDED
        from lfmc.targets.tvm.probe import TITLE, operator_parity

        if not has_nbit_products(program):
            return (skipped_rung(3, TITLE, "the artifact has no n-bit products"),)
        if open_parameters(folder).facts["made_for"]["kind"] != "cpu":
            reason = "GPUs do not round activations: the whole matrix is exact"
            return (skipped_rung(3, TITLE, reason),)
        stepper = self.run(folder)
        rounded = LayerwiseProgram(program, stepper.context, ROUNDED)
        return operator_parity(program, folder), noise_rung(program, rounded, stepper)


def _host_requirements(device: Device) -> dict[str, Any]:
    """Return the requirements on a host, for the manifest and for the loader."""
    if isinstance(device, Gpu):
        return {"name": device.name, "kind": device.kind, "arch": device.arch}
    return {
        "name": device.name,
        "kind": "cpu",
        "triple": device.triple,
        "needs": list(device.flags),
    }


# Bytes of a library: its kernels (a plan of many formats has more of them) and five functions that
# call the kernels. Measured, with a margin.
GRAPH_NBYTES = 220_000
LAYER_NBYTES = 22_000
SANDWICH_NBYTES = 5_000  # added by a norm after each block, and by a gate of the heads
EXPERTS_NBYTES = 200_000
MOE_LAYER_NBYTES = 18_000


def _graph_nbytes(config: DecoderConfig) -> int:
    """Return an upper bound of the bytes of a library."""
    per_layer = LAYER_NBYTES + (SANDWICH_NBYTES if config.sandwich_norm else 0)
    moe = config.moe
    layers = config.total_num_experts // moe.num_experts if moe else 0
    experts = EXPERTS_NBYTES + MOE_LAYER_NBYTES * layers if layers else 0
    return GRAPH_NBYTES + per_layer * config.num_layers + experts
