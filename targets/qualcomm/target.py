"""The Qualcomm target: its capabilities and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.model import DecoderConfig
from lfmc.parity.compare import Rung
from lfmc.run.stepper import Stepper
from lfmc.targets.base import DEFAULT_OPTIONS, Artifact, Request, TargetOption, require
from lfmc.targets.memory import whole_nbytes
from lfmc.targets.npu.constants import FORMATS
from lfmc.targets.npu.target import GraphSize, NpuTarget
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.rounding_noise import LIMIT, noise_rung

# QNN also rounds sums of products to float16, which torch does not.
FLOAT16_LIMIT = 4.0
GRAPH_SIZE = GraphSize(base=60_000, layer=45_000, sandwich=15_000, expert=11_000)
RUNTIMES = ("onnxruntime", "executorch")
ACTIVATIONS = {"int16": 16, "int8": 8, "float16": 0}


@dataclass(frozen=True)
class QualcommTarget(NpuTarget):
    """Hexagon NPUs through QNN: static ONNX graphs with quantized values, compiled for a chip."""

    name: ClassVar[str] = "qualcomm"
    extra: ClassVar[str] = "qualcomm"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx_ir", "onnxscript")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("soc", tuple(SOCS), "the chip"),
        TargetOption("activations", tuple(ACTIVATIONS), "type of the values between operators"),
        TargetOption("runtime", RUNTIMES, "compiles for the chip, and runs the result there"),
        TargetOption(
            "stage", ("context", "edge"), "compile for the chip, or leave compiling to the device"
        ),
        TargetOption("chunk", ("64", "16", "32", "128"), "tokens of a prefill call"),
    )

    def capabilities(
        self, config: DecoderConfig, options: Mapping[str, str] = DEFAULT_OPTIONS
    ) -> Capabilities:
        return Capabilities(
            linear=FORMATS,
            embedding=FORMATS,
            expert=FORMATS if config.moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            graph_nbytes=GRAPH_SIZE.estimate_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        for package in self.packages:
            require(package, self.extra)
        options = request.options
        if options["runtime"] == "executorch":
            require("executorch", "executorch")
            if options["stage"] == "edge":
                raise UnsupportedError(
                    "runtime=executorch needs QNN to lower a graph, so it has no stage=edge",
                    todo="-O runtime=onnxruntime -O stage=edge",
                )
        missing = _missing_tool(options)
        if missing:
            raise UnsupportedError(
                f"compiling for a chip needs QNN: {missing}",
                todo="install it, or use -O stage=edge, which leaves compiling to the device",
            )

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return whole_nbytes(config, 14.0, is_float=is_float)

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        from lfmc.targets.qualcomm.delegate import WORKING_VERSIONS, sdk_version, version_advice

        tools = {name: _missing_tool({"stage": "context", "runtime": name}) for name in RUNTIMES}
        if not tools["executorch"] and find_spec("executorch"):
            works = sdk_version().startswith(WORKING_VERSIONS)
            tools["executorch"] = None if works else f"an SDK that works: {version_advice()}"
        return {f"runtime={name}": [tool] for name, tool in tools.items() if tool}

    def why_not_here(self, request: Request) -> str | None:
        missing = _missing_tool(request.options)
        return f"QNN, which emulates the chip, is not installed: {missing}" if missing else None

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.qualcomm.lower import Lowering

        rows, bits = weights.plan.rows, ACTIVATIONS[request.options["activations"]]
        if not bits and any(isinstance(weights.format(row.name), Format) for row in rows):
            raise UnsupportedError(
                "activations=float16 supports float16 weights only", todo="--bits none"
            )
        chunk = min(int(request.options["chunk"]), request.context)
        lowering = Lowering(program, weights, request.context, chunk, bits)
        files = lowering.write(folder, request.options)
        facts = {**files.facts, "executed_by": _executed_by(request.options)}
        return Artifact(files.sources, files.stored, facts=facts, beside=files.compiled)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.qualcomm.runtime import stepper

        return stepper(folder)

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Compare every operator with torch on the artifact's own inputs, in steps of its result.

        Also compare the logits with torch, if the runtime rounds as torch does, or nearly so.
        """
        from lfmc.targets.npu.bundle import HOST_FILE
        from lfmc.targets.npu.parity import make_reference
        from lfmc.targets.qualcomm.parity import rungs
        from lfmc.targets.shared.parameters_file import open_parameters

        facts = open_parameters(folder, HOST_FILE).facts
        rounded = make_reference(program, folder)
        float16, compiled = facts["activations"] == "float16", facts["stage"] == "context"
        operators = () if float16 else rungs(program, folder)
        if compiled and not float16:
            return operators
        limit = FLOAT16_LIMIT if compiled else LIMIT
        return (*operators, noise_rung(program, rounded, self.run(folder), limit))


def _missing_tool(options: Mapping[str, str]) -> str | None:
    """Return the software that compilation or emulation lacks on this machine, or None."""
    from lfmc.targets.qualcomm.delegate import LIBRARY_FOLDER, SDK_ROOT, sdk_root
    from lfmc.targets.qualcomm.session import has_qnn

    if options["stage"] == "edge":
        return None
    if options["runtime"] == "executorch":
        sdk = f"Qualcomm's SDK, with {LIBRARY_FOLDER}, in the folder at {SDK_ROOT}"
        return None if sdk_root() else sdk
    return None if has_qnn() else "the package onnxruntime-qnn (read its license)"


def _executed_by(options: Mapping[str, str]) -> str:
    if options["stage"] == "edge":
        return "ONNX Runtime on a CPU, operator by operator"
    return "QNN's emulation of HTP on this machine: not a device"
