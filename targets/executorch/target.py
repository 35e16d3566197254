"""The ExecuTorch target: its capabilities and its operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from torch import Tensor

from lfmc.calib_free.grid.formats import ROW, Capabilities, Format, unpadded_formats
from lfmc.errors import GateError, UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program
from lfmc.graph.trace import TraceSpec
from lfmc.model import DecoderConfig
from lfmc.parity.compare import ARTIFACT_TOLERANCE, Rung, skipped_rung
from lfmc.run.conversation import ConversationModel
from lfmc.run.stepper import Stepper
from lfmc.targets.base import DEFAULT_OPTIONS, Artifact, Request, StoredTensor, TargetOption
from lfmc.targets.memory import streamed_nbytes
from lfmc.targets.shared.rounding_noise import has_nbit_products, noise_rung

# The formats of XNNPACK's kernels. Without an error, XNNPACK drops zero points, rounds scales of
# groups to bfloat16, and reads n-bit weights as plain numbers if activations are not rounded.
# Therefore the target offers no other format.
FORMATS = (
    *(Format(4, group, True, "bfloat16") for group in (32, 64, 128, 256)),
    Format(8, ROW, True, "float32"),
)

# The minimum share of a token's arithmetic in delegates, without the attention to earlier tokens.
MIN_DELEGATED_SHARE = 0.95


@dataclass(frozen=True)
class ExecutorchTarget:
    """ExecuTorch with XNNPACK on Arm and x86 CPUs: one .pte file that contains its states."""

    name: ClassVar[str] = "executorch"
    extra: ClassVar[str] = "executorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    options: ClassVar[tuple[TargetOption, ...]] = (
        TargetOption("chunk", ("128", "32", "64", "256", "512"), "maximum tokens per call"),
        TargetOption("logits", ("all", "last"), "for all tokens of a call, or only for the last"),
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
            floats=("float32",),
            merged=(("q_proj", "k_proj", "v_proj"), ("w1", "w3")),
            expert_unit="matrix",
            graph_nbytes=_graph_nbytes(config),
        )

    def check(self, config: DecoderConfig, request: Request) -> None:
        from lfmc.targets.executorch.library import load_operators

        load_operators()

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        return streamed_nbytes(config, is_float=is_float)

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
        stop_ids = weights.checkpoint.stop_ids
        methods = _runner_methods(program.config, stop_ids, request.context, chunk)
        with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as path:
            scratch, context = Path(path), request.context
            lowering = Lowering(
                program, weights, context, chunk, HANDLERS, last_only=last_only, scratch=scratch
            )
            assembled = lowering.assemble(methods)
            assembled.write(folder / MODEL)
        if assembled.delegated_share < MIN_DELEGATED_SHARE:
            raise GateError(
                "too little of the program runs in XNNPACK",
                expected=f"{MIN_DELEGATED_SHARE:.0%} of a token's arithmetic",
                got=f"{assembled.delegated_share:.1%}; "
                f"outside are {', '.join(assembled.runtime_operators)}",
                todo="this is a fault of lfmc; please report the model",
            )
        states = [
            {
                "name": spec.identifier,
                "shape": list(state_shape(spec)),
                "dtype": "float32",
                "kept_by": "the program",
                "reset": "start_pos_0",
            }
            for spec in program.states
        ]
        facts = {
            "backend": "xnnpack",
            "chunk": chunk,
            "delegates": assembled.delegates,
            "delegated_work": round(assembled.delegated_share, 4),
            "operators_outside": dict(assembled.runtime_operators),
            "states": states,
        }
        return Artifact((MODEL,), tuple(lowering.stored_tensors), (), facts)

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.executorch.stored import read

        return read(folder, stored)

    def stored_tokens(self, folder: Path) -> Mapping[str, Mapping[str, Any]]:
        """Return the token ids that the program's methods return to ExecuTorch's own runners."""
        from lfmc.targets.executorch.runtime import ExecutorchStepper
        from lfmc.targets.executorch.stored import MODEL

        read_integers = ExecutorchStepper(folder).read_integers
        bos = read_integers("get_bos_id")[0]
        return {MODEL: {"bos": None if bos < 0 else bos, "stop": read_integers("get_eos_ids")}}

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        from lfmc.targets.executorch.runtime import ExecutorchStepper

        if exact:
            raise UnsupportedError("XNNPACK's n-bit kernels always round activations")
        return ExecutorchStepper(folder)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        from lfmc.reference.layerwise_program import LayerwiseProgram
        from lfmc.targets.executorch.activations import ROUNDED

        return LayerwiseProgram(program, request.context, ROUNDED)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return None if has_nbit_products(program) else ARTIFACT_TOLERANCE

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Compare every n-bit product alone, then all together.

        The runtime exposes no values between the operators of a delegate.
        """
        from lfmc.reference.layerwise_program import LayerwiseProgram
        from lfmc.targets.executorch.activations import ROUNDED
        from lfmc.targets.executorch.products import products_rung

        if not has_nbit_products(program):
            return (skipped_rung(3, "every n-bit product of the artifact", "the program has none"),)
        stepper = self.run(folder)
        rounded = LayerwiseProgram(program, stepper.context, ROUNDED)
        return products_rung(program, folder), noise_rung(program, rounded, stepper)


def _runner_methods(
    config: DecoderConfig, stop_ids: tuple[int, ...], context: int, chunk: int
) -> dict[str, Any]:
    """Return the methods without arguments that ExecuTorch's runners of language models call."""
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


# Bytes of a program without its weights: measured, with a margin.
GRAPH = 23_000
GRAPH_PER_LAYER = 8_000
GRAPH_PER_SANDWICH = 5_500  # added for norms after each block and a gate of the heads
GRAPH_PER_EXPERT = 4_100


def _graph_nbytes(config: DecoderConfig) -> int:
    per_layer = GRAPH_PER_LAYER + (GRAPH_PER_SANDWICH if config.sandwich_norm else 0)
    experts = GRAPH_PER_EXPERT * config.total_num_experts
    return GRAPH + per_layer * config.num_layers + experts
