"""The ExecuTorch target: capabilities and verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import ROW, Capabilities, Format, unpadded
from lfmc.errors import GateError, UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.trace import TraceSpec
from lfmc.model import DecoderConfig
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Rung, skipped
from lfmc.run.stepper import Stepper
from lfmc.targets.base import Artifact, Request, StoredTensor, TargetOption
from lfmc.targets.shared.rounding_noise import n_bit, noise_rung

# What XNNPACK has kernels for. It drops zero points, rounds the scales of groups to bfloat16 and
# takes weights without rounded activations for plain numbers, all without a word: so nothing else
# is offered.
FORMATS = (
    *(Format(4, group, True, "bfloat16") for group in (32, 64, 128, 256)),
    Format(8, ROW, True, "float32"),
)

# The least share of a token's arithmetic, the attention to earlier tokens aside, that delegates do.
DELEGATED = 0.95


@dataclass(frozen=True)
class ExecutorchTarget:
    """ExecuTorch with XNNPACK on CPUs, Arm and x86: one .pte with its states inside."""

    name: ClassVar[str] = "executorch"
    extra: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("chunk", ("128", "32", "64", "256", "512"), "most tokens of a call"),
        TargetOption("logits", ("all", "last"), "of which tokens of a call"),
    )
    lowering_bytes: ClassVar[float] = 5.0
    exact: ClassVar[bool] = False

    def capabilities(self, config: DecoderConfig) -> Capabilities:
        moe, hidden = config.moe, config.hidden_size
        inner = config.num_heads * config.head_dim
        return Capabilities(
            linear=unpadded(FORMATS, hidden, config.ffn_size, inner),
            embedding=unpadded(FORMATS, hidden),
            expert=unpadded(FORMATS, hidden, moe.ffn_size) if moe else (),
            floats=("float32",),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            graph_nbytes=_graph_nbytes(config),
            embedding_copies=2 if config.tied_embedding else 1,
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        from lfmc.targets.executorch.library import load_operators

        load_operators()

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        return {}

    def why_not_here(self, request: Request) -> str | None:
        return None

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        return TraceSpec(context=request.context, batch=1, length=None)

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        from lfmc.targets.executorch.handlers import HANDLERS
        from lfmc.targets.executorch.lower import Lowering, state_shape
        from lfmc.targets.executorch.stored import MODEL

        chunk = min(int(request.options["chunk"]), request.context)
        last_only = request.options["logits"] == "last"
        lowering = Lowering(program, weights, request.context, chunk, HANDLERS, last_only=last_only)
        stop_ids = weights.checkpoint.stop_ids
        made = lowering.assemble(_methods(program.config, stop_ids, request.context, chunk))
        if made.inside_work < DELEGATED:
            raise GateError(
                "too little of the program runs in XNNPACK",
                expected=f"{DELEGATED:.0%} of a token's arithmetic",
                got=f"{made.inside_work:.1%}; outside are {', '.join(made.outside)}",
                todo="this is a fault of lfmc; please report the model",
            )
        (folder / MODEL).write_bytes(made.data)
        states = [
            {
                "name": spec.identifier,
                "shape": list(state_shape(spec)),
                "dtype": "float32",
                "kept_by": "the program",
                "reset": "start_pos 0",
            }
            for spec in program.states
        ]
        facts = {
            "backend": "xnnpack",
            "chunk": chunk,
            "delegates": made.delegates,
            "delegated_work": round(made.inside_work, 4),
            "operators_outside": dict(made.outside),
            "states": states,
        }
        return Artifact((MODEL,), tuple(lowering.stored), (), facts)

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.executorch.stored import read

        return read(folder, stored)

    def stored_tokens(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Of the program's methods, which ExecuTorch's own runners ask."""
        from lfmc.targets.executorch.runtime import ExecutorchStepper
        from lfmc.targets.executorch.stored import MODEL

        told = ExecutorchStepper(folder).told
        bos = told("get_bos_id")[0]
        return {MODEL: {"bos": None if bos < 0 else bos, "stop": told("get_eos_ids")}}

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.executorch.runtime import ExecutorchStepper

        if exact:
            raise UnsupportedError("XNNPACK's n-bit kernels always round activations")
        return ExecutorchStepper(folder)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> torch.nn.Module:
        from lfmc.targets.executorch.activations import rounded

        return rounded(program)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return None if n_bit(program) else ARTIFACT_TOLERANCE

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Every n-bit product alone; then all together, as the runtime shows nothing inside."""
        from lfmc.targets.executorch.activations import rounded
        from lfmc.targets.executorch.products import products_rung

        if not n_bit(program):
            return (skipped(3, "every n-bit product of the artifact", "it has none"),)
        return products_rung(program, folder), noise_rung(
            program, rounded(program), self.run(folder)
        )


def _methods(
    config: DecoderConfig, stop_ids: tuple[int, ...], context: int, chunk: int
) -> dict[str, Any]:
    """Methods without arguments that ExecuTorch's own runners of language models ask for."""
    return {
        "get_bos_id": -1 if config.bos_id is None else config.bos_id,
        "get_eos_ids": list(stop_ids),
        "get_max_context_len": context,
        "get_max_seq_len": chunk,
        "get_n_layers": config.num_layers,
        "get_vocab_size": config.vocab_size,
        "enable_dynamic_shape": True,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
    }


# Bytes of a program that are no weights: measured, with a margin.
GRAPH = 20_000
GRAPH_PER_LAYER = 8_000
GRAPH_PER_SANDWICH = 5_500  # more, with a norm behind each block, and a gate of the heads
GRAPH_PER_EXPERT = 4_100


def _graph_nbytes(config: DecoderConfig) -> int:
    per_layer = GRAPH_PER_LAYER + (GRAPH_PER_SANDWICH if config.sandwich_norm else 0)
    experts = GRAPH_PER_EXPERT * config.num_experts_in_all
    return GRAPH + per_layer * config.num_layers + experts
