"""The Ethos-U target: its capabilities and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from lfmc.calib_free.grid.formats import Capabilities
from lfmc.errors import UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.machine.isolated import FLAG
from lfmc.model import DecoderConfig
from lfmc.parity.compare import Rung
from lfmc.run.stepper import Stepper
from lfmc.targets.base import DEFAULT_OPTIONS, Artifact, Request, TargetOption
from lfmc.targets.ethos_u.accelerators import ACCELERATORS
from lfmc.targets.ethos_u.vgf import SUFFIX, VGF, convert, require_converter
from lfmc.targets.memory import whole_nbytes
from lfmc.targets.npu.constants import FORMATS
from lfmc.targets.npu.target import GraphSize, NpuTarget

GRAPH_SIZE = GraphSize(base=8_000, layer=6_000, sandwich=2_000, expert=800)
EXECUTED_BY = "TOSA's reference model, of the graphs that Vela compiled: not a device"
ACTIVATIONS = {"int16": 16, "int8": 8}
EIGHT_BITS = tuple(format for format in FORMATS if format.bits == 8)
CLASH = "its tools require ml_dtypes 0.5.1, and onnx requires a newer version"


def _is_installed() -> bool:
    return all(map(find_spec, EthosUTarget.packages))


@dataclass(frozen=True)
class EthosUTarget(NpuTarget):
    """Arm's Ethos-U NPUs: static integer graphs in TOSA, compiled by Vela into a `.pte`."""

    name: ClassVar[str] = "ethos-u"
    extra: ClassVar[str] = "ethos-u"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "ethosu", "tosa_reference_model")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("accelerator", tuple(ACCELERATORS), "the NPU"),
        TargetOption("activations", tuple(ACTIVATIONS), "type of the values between operators"),
        TargetOption("chunk", ("16", "8", "32", "64"), "tokens of a prefill call"),
        TargetOption(
            "vgf",
            ("no", "yes"),
            "also write VGF for Arm's neural graphics, which lfmc does not execute",
        ),
    )

    def capabilities(
        self, config: DecoderConfig, options: Mapping[str, str] = DEFAULT_OPTIONS
    ) -> Capabilities:
        return Capabilities(
            linear=EIGHT_BITS,
            embedding=EIGHT_BITS,
            expert=EIGHT_BITS if config.moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            graph_nbytes=GRAPH_SIZE.estimate_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        accelerator = ACCELERATORS[request.options["accelerator"]]
        if request.options["activations"] == "int16" and not accelerator.wide:
            raise UnsupportedError(
                f"{accelerator.name} lacks products of two 16-bit values, which attention needs",
                todo="-O activations=int8, or an ethos-u85",
            )
        if request.options["activations"] == "int16" and config.moe:
            raise UnsupportedError(
                "experts require 8-bit scores: ExecuTorch converts 16-bit scores to float",
                todo="-O activations=int8",
            )
        if not _is_installed():
            raise UnsupportedError(
                "this target needs an environment of its own", got=CLASH, todo=f"add {FLAG}"
            )
        if request.options["vgf"] == "yes":
            require_converter()

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        # 29 for 17M parameters, more than for a tiny model
        return whole_nbytes(config, 30.0, is_float=is_float)

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        advice = f"an environment of its own ({CLASH}): lfmc export --target ethos-u {FLAG}"
        return {} if _is_installed() else {"every option": [f"{advice} creates one and runs there"]}

    def why_not_here(self, request: Request) -> str | None:
        return None

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.ethos_u.lower import Lowering

        activations = request.options["activations"]
        chunk = min(int(request.options["chunk"]), request.context)
        lowering = Lowering(program, weights, request.context, chunk, ACTIVATIONS[activations])
        files = lowering.write(folder, ACCELERATORS[request.options["accelerator"]], activations)
        facts = {**files.facts, "executed_by": EXECUTED_BY}
        beside = files.compiled
        if request.options["vgf"] == "yes":
            converter, version = require_converter()
            tosa = [name for name in beside if name.endswith(SUFFIX)]
            vgf = [name.removesuffix(SUFFIX) + VGF for name in tosa]
            for source, name in zip(tosa, vgf, strict=True):
                convert(converter, folder / source, folder / name)
            facts["vgf"] = {"files": vgf, "converter": version, "executed": False}
            beside = (*beside, *vgf)
        return Artifact(files.sources, files.stored, facts=facts, beside=beside)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.ethos_u.runtime import stepper

        return stepper(folder)

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Compare every operator with torch on the artifact's own inputs, in steps of its result.

        The operators are compared in graphs whose outputs equal the artifact's. With int8, also
        compare the logits with torch. With int16, tables of functions are not exact, and the error
        is large relative to the small rounding noise of 16 bits.
        """
        from lfmc.targets.ethos_u.parity import rungs
        from lfmc.targets.npu.bundle import HOST_FILE
        from lfmc.targets.npu.parity import make_reference
        from lfmc.targets.shared.parameters_file import open_parameters
        from lfmc.targets.shared.rounding_noise import LIMIT, noise_rung

        operators = rungs(program, folder)
        if open_parameters(folder, HOST_FILE).facts["activations"] == "int16":
            return operators
        rounded = make_reference(program, folder)
        return (*operators, noise_rung(program, rounded, self.run(folder), LIMIT))
