"""A toy target: writes codes and scales to a safetensors file and runs them in torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file

from lfmc.calib_free.grid.formats import FLOAT_NBYTES, Capabilities, Format, parse_format
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program, Weight
from lfmc.graph.trace import TraceSpec, trace
from lfmc.model import DecoderConfig, read_config
from lfmc.model.rope import inverse_frequencies
from lfmc.parity.compare import FLOAT_TOLERANCE
from lfmc.passes.base import apply
from lfmc.passes.pipeline import pipeline
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.run.stepper import Stepper, TorchStepper
from lfmc.targets.base import Artifact, Request, StoredTensor, TargetOption
from lfmc.targets.memory import whole_nbytes

MODEL, FACTS = "model.safetensors", "facts.json"
FORMATS = tuple(Format(bits, 32, True, "float16") for bits in (2, 3, 4, 8))
MERGED = (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))  # as the pass merge-projections does


@dataclass(frozen=True)
class ToyTarget:
    name = extra = "toy"
    packages: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[TargetOption, ...]] = ()
    exact: ClassVar[bool] = False  # run() rounds nothing, so it needs no exact mode

    def capabilities(self, config: DecoderConfig, options: Mapping[str, str]) -> Capabilities:
        size = 1000 * config.num_layers + 800 * config.total_num_experts + 20_000
        return Capabilities(*[FORMATS] * 3, tuple(FLOAT_NBYTES), MERGED, graph_nbytes=size)

    def check(self, config: DecoderConfig, request: Request) -> None:
        """Accept every model and request."""

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return whole_nbytes(config, 2.0, is_float=is_float)  # save_file takes all tensors at once

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        return {}

    def why_not_here(self, request: Request) -> str | None:
        return None  # torch runs on every machine

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        return TraceSpec(request.context)  # one conversation, any number of tokens per call

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        tensors, stored = {}, []
        # run() computes constants from the configuration.
        for name, w in ((n, w) for n, w in program.weights.items() if w.part != "constant"):
            tensor = weights.floats(w.sources) if w.part == "values" else weights.value(name, w)
            tensors[name] = tensor
            stored.append(StoredTensor(name, w.part, w.sources, "rows", tensor.nbytes))
        save_file(tensors, folder / MODEL)
        formats = {row.name: row.format for row in weights.plan.rows}
        facts = [weights.checkpoint.raw_config, request.context, formats]
        (folder / FACTS).write_text(json.dumps(facts))
        return Artifact((MODEL, FACTS), tuple(stored))

    def read_tensor(self, folder: Path, stored: StoredTensor) -> torch.Tensor:
        return load_file(folder / MODEL)[stored.name]

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        raw, context, formats = json.loads((folder / FACTS).read_text())
        tensors = load_file(folder / MODEL)
        program = trace(read_config(raw), TraceSpec(context))
        apply(pipeline({k: parse_format(v) for k, v in formats.items()}), program)

        def value(name: str, weight: Weight) -> torch.Tensor:
            if weight.part == "constant":
                return inverse_frequencies(program.config, name.removeprefix("rope."))
            return tensors[name].float() if weight.part == "values" else tensors[name]

        return TorchStepper(program.bind(value), program.config, context)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> LayerwiseProgram:
        return LayerwiseProgram(program, request.context)  # weights of the plan, not of the file

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return FLOAT_TOLERANCE

    def operator_parity(self, program: Program, folder: Path, artifact: Artifact) -> tuple[()]:
        return ()  # no operator rounds, so rung 3 checks the whole model
