"""The interface of a target: its capabilities, and how it lowers a program and runs the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points, metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from lfmc.errors import InputError, UnsupportedError, did_you_mean

if TYPE_CHECKING:  # torch takes seconds to import, and a list of target names does not need it
    from torch import Tensor, fx

    from lfmc.calib_free.grid.formats import Capabilities
    from lfmc.graph.planned_weights import PlannedWeights
    from lfmc.graph.program import Program
    from lfmc.graph.trace import TraceSpec
    from lfmc.model import DecoderConfig
    from lfmc.parity.compare import Rung
    from lfmc.run.conversation import ConversationModel
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
    """An option of a target: the user picks one of `choices`, and the first is the default."""

    name: str
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Request:
    """The settings of one export: the context in tokens, and a value for each target option."""

    context: int
    options: Mapping[str, str]


DEFAULT_OPTIONS: Mapping[str, str] = MappingProxyType({})

Arrangement = Literal["rows", "experts", "experts_gate_up"]


@dataclass(frozen=True)
class StoredTensor:
    """A constant in an artifact's files, and the checkpoint tensors that it stores.

    `part` is `codes`, `scales`, `zeros` or `values`. `arrangement` is how the sources are joined:
    `rows` (concatenated along the rows), `experts` (stacked on a new first dim) or
    `experts_gate_up` (stacked like `experts`, with the rows of w1 and w3 interleaved). Constants
    with equal sources and part store consecutive blocks of rows, in the order of the list.
    """

    name: str
    part: str
    sources: tuple[str, ...]
    arrangement: Arrangement
    nbytes: int


@dataclass(frozen=True)
class Probe:
    """An n-bit operator of the program, and the names of its inputs and output in the artifact."""

    node: str
    kind: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Artifact:
    """The result of lowering: relative file names, the stored tensors, and facts for the manifest.

    `beside` lists files that ship with the artifact but that no app loads. No budget counts them.
    The fact `states` has an entry for each state with its `reset`, which starts a conversation:
    "zeros" (fill it with zeros), "empty" (pass it with length 0), or "start_pos_0" (the program
    resets it in a call at position 0). The export prints the fact `known_troubles`, a list of
    entries with `what` and `link`. `probes` lists the operators of the artifact that parity can
    compare one by one.
    `settings` are keys that the export adds to JSON files of the checkpoint, by file name.
    """

    files: tuple[str, ...]
    tensors: tuple[StoredTensor, ...]
    probes: tuple[Probe, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Target(Protocol):
    """A frozen dataclass. Its methods import the libraries that they need when they are called."""

    name: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[TargetOption, ...]]
    exact: ClassVar[bool]  # whether the artifact can also run with float activations

    def capabilities(self, config: DecoderConfig, options: Mapping[str, str]) -> Capabilities:
        """Return the formats that a plan may use, and a bound of the bytes that are not tensors.

        `options` are options of the target by name; an absent option has its default.
        """

    def check(self, config: DecoderConfig, request: Request) -> None:
        """Raise `UnsupportedError` for a missing package or a model that can't be exported."""

    def export_nbytes(self, config: DecoderConfig, *, is_float: bool) -> int:
        """Return the memory, in bytes, that an export takes without parity: measured, with a
        margin. If `is_float`, no matrix is quantized.

        See `lfmc.targets.memory`.
        """

    def missing_tools(self) -> Mapping[str, Sequence[str]]:
        """Return the programs and files (other than Python packages) that are missing on this
        machine, by the option value that needs them."""

    def why_not_here(self, request: Request) -> str | None:
        """Return why this machine can't execute the artifact, or None if it can.

        Such an export skips parity rungs 3 and 4 and reports that it did.
        """

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        """Return how to trace the graph: batch, tokens per call, slots and cache updates."""

    def lower(
        self, program: Program, weights: PlannedWeights, request: Request, folder: Path
    ) -> Artifact:
        """Write the fused program and the planned weights to `folder`, without rounding again."""

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        """Read a stored tensor from disk, unchanged, as a torch tensor."""

    def run(self, folder: Path, *, exact: bool = False) -> Stepper:
        """Load the artifact for execution; `exact` requests float activations, if supported."""

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        """Return the bound program in torch, with activations rounded as the runtime rounds them
        for the artifact in `folder`."""

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        """Return the tolerance of rung 3, or None if its difference is only reported.

        The tolerance exceeds float rounding error only where a kernel rounds.
        """

    def operator_parity(
        self, program: Program, folder: Path, artifact: Artifact
    ) -> tuple[Rung, ...]:
        """Compare every n-bit operator of the shipped artifact in isolation, and run the target's
        other checks that are stricter than a comparison of logits."""


def choose_options(target: Target, values: Mapping[str, str]) -> dict[str, str]:
    """Return a value for every option of the target.

    Raises `InputError` for an unknown option or value. The error names the targets that have the
    option, or a similar name.
    """
    defaults = {option.name: option.choices[0] for option in target.options}
    for name in values.keys() - defaults.keys():
        raise InputError(
            f"target '{target.name}' has no such option",
            expected=", ".join(defaults),
            got=name,
            todo=_advise_option(target, name),
        )
    for option in target.options:
        value = values.get(option.name)
        if value is not None and value not in option.choices:
            raise InputError(
                f"target '{target.name}' has no such {option.name}",
                expected=", ".join(option.choices),
                got=value,
                todo=did_you_mean(value, option.choices),
            )
    return {**defaults, **values}


def _advise_option(target: Target, name: str) -> str | None:
    """Return which targets have an option, or an option of `target` with a similar name."""
    owners = [owner for owner in TARGETS if name in (o.name for o in get_target(owner).options)]
    if not owners:
        return did_you_mean(name, [option.name for option in target.options])
    kind = "an option of target" if len(owners) == 1 else "an option of the targets"
    return f"{name} is {kind} {', '.join(owners)}: leave it out, or add --target {owners[0]}"


Handler = TypeVar("Handler")


def find_handler(handlers: Mapping[str, Handler], node: fx.Node, target: str) -> Handler:
    """Return the lowering function for the operator of a node.

    Raises `UnsupportedError` if there is none.
    """
    from lfmc.graph.program import operator_name

    name = operator_name(node)
    if name not in handlers:
        raise unsupported_operator(node, target)
    return handlers[name]


def unsupported_operator(node: fx.Node, target: str) -> UnsupportedError:
    """Return the error for an operator that a target can't lower."""
    from lfmc.graph.program import operator_name

    return UnsupportedError(
        f"the {target} target does not support operator '{operator_name(node)}'",
        where=node.name,
        todo="a pass that should have fused it did not match; please report the model",
    )


def get_target(name: str) -> Target:
    """Return a built-in target, or one that is registered as an `lfmc.targets` entry point."""
    path = TARGETS.get(name)
    if path is None:
        entries = [e for e in entry_points(group="lfmc.targets") if e.name == name]
        if not entries:
            raise no_such_target(name)
        target: Target = entries[0].load()()
        return target
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)()  # type: ignore[no-any-return]


def no_such_target(name: str) -> InputError:
    """Return the error for an unknown target; it names a similar one."""
    names = target_names()
    return InputError(
        "there is no such target",
        expected=", ".join(names),
        got=name,
        todo=did_you_mean(name, names),
    )


def target_names() -> list[str]:
    """Return the name of every target that `get_target` accepts, sorted."""
    return sorted({*TARGETS, *(entry.name for entry in entry_points(group="lfmc.targets"))})


def install_advice(extra: str) -> str:
    """Return how to install the packages of an extra of lfmc or of a third-party target."""
    if extra in (metadata("lfmc").get_all("Provides-Extra") or ()):
        return f"pip install 'lfmc[{extra}]'"
    return f"install '{extra}', as described by the package of the target"


def require(package: str, extra: str) -> Any:
    """Import a target's library. Raises `UnsupportedError`, naming its extra, if it is missing."""
    try:
        return import_module(package)
    except ImportError as error:
        raise UnsupportedError(
            f"this target needs the package '{package.partition('.')[0]}'",
            got=error,
            todo=install_advice(extra),
        ) from error
