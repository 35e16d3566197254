"""The Ethos-U target: capabilities and verbs."""

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
from lfmc.targets.base import Artifact, Request, TargetOption
from lfmc.targets.ethos_u.accelerators import ACCELERATORS
from lfmc.targets.ethos_u.vgf import SUFFIX, VGF, convert, require_converter
from lfmc.targets.npu.constants import FORMATS
from lfmc.targets.npu.target import GraphSize, NpuTarget

HOST_FACTS = GraphSize(base=8_000, layer=6_000, sandwich=2_000, expert=800)
EXECUTED_BY = "TOSA's reference model, of the graphs that Vela compiled: not a device"
ACTIVATIONS = {"int16": 16, "int8": 8}
EIGHT_BITS = tuple(own for own in FORMATS if own.bits == 8)
CLASH = "its tools take ml_dtypes 0.5.1 alone, and onnx a newer one"


def _is_here() -> bool:
    return all(map(find_spec, EthosUTarget.packages))


@dataclass(frozen=True)
class EthosUTarget(NpuTarget):
    """Arm's Ethos-U NPUs: static graphs of integers as TOSA, compiled by Vela into a `.pte`."""

    name: ClassVar[str] = "ethos-u"
    extra: ClassVar[str] = "ethos-u"
    packages: ClassVar[tuple[str, ...]] = ("executorch", "ethosu", "tosa_reference_model")
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("accelerator", tuple(ACCELERATORS), "the NPU"),
        TargetOption("activations", tuple(ACTIVATIONS), "what values between operators are"),
        TargetOption("chunk", ("16", "8", "32", "64"), "tokens of a long call"),
        TargetOption(
            "vgf", ("no", "yes"), "write VGF, too, for Arm's neural graphics: not executed"
        ),
    )
    lowering_bytes: ClassVar[float] = 30.0  # 29 at 17M, beyond what a tiny model takes

    def capabilities(self, config: DecoderConfig) -> Capabilities:
        return Capabilities(
            linear=EIGHT_BITS,
            embedding=EIGHT_BITS,
            expert=EIGHT_BITS if config.moe else (),
            floats=("float32", "bfloat16", "float16"),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            graph_nbytes=HOST_FACTS.of(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        accelerator = ACCELERATORS[request.options["accelerator"]]
        if request.options["activations"] == "int16" and not accelerator.wide:
            raise UnsupportedError(
                f"{accelerator.name} multiplies no 16-bit values by each other, as attention does",
                todo="-O activations=int8, or an ethos-u85",
            )
        if request.options["activations"] == "int16" and config.moe:
            raise UnsupportedError(
                "experts are chosen of 8-bit scores only: ExecuTorch makes floats of 16-bit ones",
                todo="-O activations=int8",
            )
        if not _is_here():
            raise UnsupportedError(
                "this target needs an environment of its own", got=CLASH, todo=f"add {FLAG}"
            )
        if request.options["vgf"] == "yes":
            require_converter()

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        advice = f"an environment of its own ({CLASH}): lfmc export --target ethos-u {FLAG}"
        return {} if _is_here() else {"every option": [f"{advice} makes one and runs there"]}

    def why_not_here(self, request: Request) -> str | None:
        return None

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.ethos_u.lower import Lowering

        activations = request.options["activations"]
        chunk = min(int(request.options["chunk"]), request.context)
        program.bind(weights.value)
        lowering = Lowering(program, weights, request.context, chunk, ACTIVATIONS[activations])
        made = lowering.write(folder, ACCELERATORS[request.options["accelerator"]], activations)
        facts = {**made.facts, "executed_by": EXECUTED_BY}
        beside = made.compiled
        if request.options["vgf"] == "yes":
            converter, version = require_converter()
            tosa = [name for name in beside if name.endswith(SUFFIX)]
            written = [name.removesuffix(SUFFIX) + VGF for name in tosa]
            for source, name in zip(tosa, written, strict=True):
                convert(converter, folder / source, folder / name)
            facts["vgf"] = {"files": written, "converter": version, "executed": False}
            beside = (*beside, *written)
        return Artifact(made.sources, made.stored, facts=facts, beside=beside)

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.ethos_u.runtime import stepper

        return stepper(folder)

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Every operator on the artifact's own inputs, in steps of its result, in graphs that give
        exactly what the artifact's do; and all together where operators are exact: tables of 16
        bits are not, and what rounds so little shows it."""
        from lfmc.targets.ethos_u.parity import rungs
        from lfmc.targets.npu.bundle import HOST_FILE
        from lfmc.targets.npu.parity import reference
        from lfmc.targets.shared.parameters_file import open_parameters
        from lfmc.targets.shared.rounding_noise import LIMIT, noise_rung

        alone = rungs(program, folder)
        if open_parameters(folder, HOST_FILE).facts["activations"] == "int16":
            return alone
        together = noise_rung(program, reference(program, folder), self.run(folder), LIMIT)
        return (*alone, together)
