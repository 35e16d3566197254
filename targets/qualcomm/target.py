"""The Qualcomm target: capabilities and verbs."""

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
from lfmc.targets.base import Artifact, Request, TargetOption, require
from lfmc.targets.npu.constants import FORMATS
from lfmc.targets.npu.target import GraphSize, NpuTarget
from lfmc.targets.qualcomm.socs import SOCS
from lfmc.targets.shared.rounding_noise import LIMIT, noise_rung

# QNN rounds sums of products to float16, too, which torch does not.
LIMIT_OF_HALVES = 4.0
GRAPHS = GraphSize(base=60_000, layer=45_000, sandwich=15_000, expert=11_000)
RUNTIMES = ("onnxruntime", "executorch")
ACTIVATIONS = {"int16": 16, "int8": 8, "float16": 0}


@dataclass(frozen=True)
class QualcommTarget(NpuTarget):
    """Hexagon NPUs by QNN: static graphs as ONNX with quantized values, compiled for a chip."""

    name: ClassVar[str] = "qualcomm"
    extra: ClassVar[str] = "qualcomm"
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime", "onnx_ir", "onnxscript")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("soc", tuple(SOCS), "the chip"),
        TargetOption("activations", tuple(ACTIVATIONS), "what values between operators are"),
        TargetOption("runtime", RUNTIMES, "what compiles for the chip, and runs there"),
        TargetOption(
            "stage", ("context", "edge"), "compiled for the chip, or ONNX that a device compiles"
        ),
        TargetOption("chunk", ("64", "16", "32", "128"), "tokens of a long call"),
    )
    lowering_bytes: ClassVar[float] = 14.0

    def capabilities(self, config: DecoderConfig) -> Capabilities:
        return Capabilities(
            linear=FORMATS,
            embedding=FORMATS,
            expert=FORMATS if config.moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            graph_nbytes=GRAPHS.of(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        for package in self.packages:
            require(package, self.extra)
        options = request.options
        if options["runtime"] == "executorch":
            require("executorch", "executorch")
            if options["stage"] == "edge":
                raise UnsupportedError(
                    "ExecuTorch asks QNN of every operator, and has nothing to ship without it",
                    todo="-O runtime=onnxruntime -O stage=edge",
                )
        missing = _missing(options)
        if missing:
            raise UnsupportedError(
                f"compiling for a chip needs QNN: {missing}", todo="see lfmc doctor"
            )

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        from lfmc.targets.qualcomm.delegate import WORKS, advice, sdk_version

        found = {name: _missing({"stage": "context", "runtime": name}) for name in RUNTIMES}
        if not found["executorch"] and find_spec("executorch"):
            known = sdk_version().startswith(WORKS)
            found["executorch"] = None if known else f"an SDK that was seen to work: {advice()}"
        return {f"runtime={name}": [lacks] for name, lacks in found.items() if lacks}

    def why_not_here(self, request: Request) -> str | None:
        missing = _missing(request.options)
        return f"QNN, which emulates the chip, is not here: {missing}" if missing else None

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.qualcomm.lower import Lowering

        rows, bits = weights.plan.rows, ACTIVATIONS[request.options["activations"]]
        if not bits and any(isinstance(weights.format(row.name), Format) for row in rows):
            raise UnsupportedError(
                "QNN computes in float16 with float16 weights only", todo="--bits none"
            )
        chunk = min(int(request.options["chunk"]), request.context)
        program.bind(weights.value)
        lowering = Lowering(program, weights, request.context, chunk, bits)
        made = lowering.write(folder, request.options)
        facts = {**made.facts, "executed_by": _executed_by(request.options)}
        return Artifact(made.sources, made.stored, facts=facts, beside=made.compiled)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.qualcomm.runtime import stepper

        return stepper(folder)

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Every operator on the artifact's own inputs, in steps of its result; and all of them
        together where they round as torch does, or nearly."""
        from lfmc.targets.npu.bundle import HOST_FILE
        from lfmc.targets.npu.parity import reference
        from lfmc.targets.qualcomm.parity import rungs
        from lfmc.targets.shared.parameters_file import open_parameters

        facts = open_parameters(folder, HOST_FILE).facts
        rounds = reference(program, folder)
        halves, compiled = facts["activations"] == "float16", facts["stage"] == "context"
        own = () if halves else rungs(program, folder)
        if compiled and not halves:
            return own
        limit = LIMIT_OF_HALVES if compiled else LIMIT
        return (*own, noise_rung(program, rounds, self.run(folder), limit))


def _missing(options: Mapping[str, str]) -> str | None:
    """What compiling and emulation lack on this machine."""
    from lfmc.targets.qualcomm.delegate import LIBRARIES, SDK_ROOT, sdk_root
    from lfmc.targets.qualcomm.session import has_qnn

    if options["stage"] == "edge":
        return None
    if options["runtime"] == "executorch":
        asked = f"Qualcomm's SDK, with {LIBRARIES}, in the folder that {SDK_ROOT} names"
        return None if sdk_root() else asked
    return None if has_qnn() else "the package onnxruntime-qnn (read its licence)"


def _executed_by(options: Mapping[str, str]) -> str:
    if options["stage"] == "edge":
        return "ONNX Runtime on a CPU, operator by operator"
    return "QNN's emulation of HTP on this machine: not a device"
