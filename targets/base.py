"""What a target is: capabilities, and the verbs that turn a program into an artifact and run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points, metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, fx

from lfmc.calib_free.grid.formats import Capabilities
from lfmc.errors import InputError, UnsupportedError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.program import Program, operator_name
from lfmc.graph.trace import TraceSpec
from lfmc.model import DecoderConfig
from lfmc.parity.compare import Rung
from lfmc.run.stepper import Stepper

TARGETS: Mapping[str, str] = {
    "coreml": "lfmc.targets.coreml.target:CoremlTarget",
    "ethos-u": "lfmc.targets.ethos_u.target:EthosUTarget",
    "executorch": "lfmc.targets.executorch.target:ExecutorchTarget",
    "mlir": "lfmc.targets.mlir.target:MlirTarget",
    "onnx": "lfmc.targets.onnx.target:OnnxTarget",
    "qualcomm": "lfmc.targets.qualcomm.target:QualcommTarget",
    "tvm": "lfmc.targets.tvm.target:TvmTarget",
}


@dataclass(frozen=True)
class TargetOption:
    """Something that a target leaves to its user: one of `choices`, by default the first."""

    name: str
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Request:
    """What an export asks of a target: how many positions, and a choice for each of its options."""

    context: int
    options: Mapping[str, str]


Arrangement = Literal["rows", "experts", "experts_gate_up"]


@dataclass(frozen=True)
class StoredTensor:
    """A constant in an artifact's files, and the checkpoint's tensors that it holds.

    `part` is `codes`, `scales`, `zeros` or `values`. `arrangement` tells the order: `rows` (one
    below the other), `experts` (stacked on a new first dim), `experts_gate_up` (the same, with the
    rows of w1 and w3 taken in turn). Where several have the same sources and part, each holds some
    of the rows, in this order; with another `copy` each holds all of them once more.
    """

    name: str
    part: str
    sources: tuple[str, ...]
    arrangement: Arrangement
    nbytes: int
    copy: int = 0


@dataclass(frozen=True)
class Probe:
    """An n-bit operator of the program, and the artifact's names of its inputs and its result."""

    node: str
    kind: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Artifact:
    """What lowering wrote: file names (relative), the tensors in them, and facts for the manifest.

    `beside` are files that ship with these, though no app loads them: no budget counts them.
    `known_troubles` among the facts (each with `what` and `link`) are printed after an export.
    `probes` are places where the artifact's own operators can be compared one by one.
    """

    files: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    probes: tuple[Probe, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


class Target(Protocol):
    """A frozen dataclass; the libraries that it needs are imported inside of its verbs."""

    name: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[TargetOption, ...]]
    lowering_bytes: ClassVar[float]  # of memory, a parameter, for n-bit weights: measured
    exact: ClassVar[bool]  # the artifact can also be run with float activations

    def capabilities(self, config: DecoderConfig) -> Capabilities:
        """What a plan may choose from, and what the files hold besides tensors at most."""

    def check(self, config: DecoderConfig, request: Request) -> None:
        """Raise `UnsupportedError` for a missing package, or for what can't be exported."""

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        """What this machine lacks of programs and files that are no Python packages, by the choice
        that needs it."""

    def why_not_here(self, request: Request) -> str | None:
        """Why this machine can't execute what is exported, where that is so: then it ships without
        rungs 3 and 4, and says so."""

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        """The form of the graph: batch, tokens a call, slots, how a cache is written."""

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        """Write the fused program and the planned weights, rounding none, into `folder`."""

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        """A stored tensor as it lies on disk, in torch."""

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        """Execute the artifact; `exact` asks for float activations, of a target that has them."""

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> torch.nn.Module:
        """The bound program with the runtime's own rounding of activations, in torch, as the
        artifact in `folder` has it."""

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        """What rung 3 may differ by: more than float arithmetic only where a kernel rounds; None
        where it is only reported."""

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Every n-bit operator of the artifact, as shipped, on its own; and whatever else is
        stricter than a comparison of logits."""


def choose_options(target: Target, given: Mapping[str, str]) -> dict[str, str]:
    """A choice for every option of a target; `InputError` for a name or a choice it has not."""
    chosen = {option.name: option.choices[0] for option in target.options}
    for name in given.keys() - chosen.keys():
        raise InputError(
            f"target '{target.name}' has no such option", expected=", ".join(chosen), got=name
        )
    for option in target.options:
        value = given.get(option.name)
        if value is not None and value not in option.choices:
            raise InputError(
                f"target '{target.name}' has no such {option.name}",
                expected=", ".join(option.choices),
                got=value,
            )
    return {**chosen, **given}


Handler = TypeVar("Handler")


def find_handler(handlers: Mapping[str, Handler], node: fx.Node, target: str) -> Handler:
    """A lowering's function for the operator of a node; `UnsupportedError` where it has none."""
    name = operator_name(node)
    if name not in handlers:
        raise missing_form(node, target)
    return handlers[name]


def missing_form(node: fx.Node, target: str) -> UnsupportedError:
    """What to raise for an operator that a target does not know."""
    return UnsupportedError(
        f"the {target} target has no form for operator '{operator_name(node)}'",
        where=node.name,
        todo="a pass that should have fused it did not match; please report the model",
    )


def get_target(name: str) -> Target:
    """The target of that name: one of ours, or one registered as an `lfmc.targets` entry point."""
    path = TARGETS.get(name)
    if path is None:
        found = [e for e in entry_points(group="lfmc.targets") if e.name == name]
        if not found:
            known = ", ".join(target_names())
            raise InputError("there is no such target", expected=known, got=name)
        target: Target = found[0].load()()
        return target
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)()  # type: ignore[no-any-return]


def target_names() -> list[str]:
    """Every target that `get_target` knows."""
    return sorted({*TARGETS, *(entry.name for entry in entry_points(group="lfmc.targets"))})


def install_advice(extra: str) -> str:
    """What brings the packages of an extra: of lfmc's, or of a package that brings a target."""
    if extra in (metadata("lfmc").get_all("Provides-Extra") or ()):
        return f"pip install 'lfmc[{extra}]'"
    return f"install '{extra}', as the target's own package says"


def require(package: str, extra: str) -> Any:
    """Import a target's library, or say which extra brings it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise UnsupportedError(
            f"this target needs the package '{package.partition('.')[0]}'",
            got=error,
            todo=install_advice(extra),
        ) from error
