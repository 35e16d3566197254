"""What a page about a plan tells: numbers only, gathered from the checkpoint and the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from lfmc.calib_free.auto.budget_ladder import Ladder, ladder
from lfmc.calib_free.auto.method import Measured
from lfmc.calib_free.grid.formats import Capabilities, Floats, Format, parse_format
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.roles import QUANTIZED
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.report.spectrum_facts import Spectrum, shown, spectra_of
from lfmc.report.tensor_labels import GROUPS, Place, group, place


@dataclass(frozen=True)
class TensorFacts:
    """A stored tensor: its row of the plan, and where it stands in the model.

    `quantizable`: it is a matrix, for which a method has a choice.
    """

    row: PlanRow
    place: Place
    group: str
    format: Format | Floats
    numel: int
    quantizable: bool

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.row.nbytes / self.numel


@dataclass(frozen=True)
class GroupFacts:
    """Bytes and parameters of one group of tensors."""

    name: str
    tensors: int
    nbytes: int
    params: int


@dataclass(frozen=True)
class CurvePoint:
    """A matrix in one format: bits per weight with scales, error, and nats per token.

    `error` is the weighted squared error over the weighted energy.
    """

    format: Format
    bits_per_weight: float
    error: float
    cost: float


@dataclass(frozen=True)
class KindCurve:
    """Matrices of one kind: means over them of each format, and how many chose which."""

    kind: str
    points: tuple[CurvePoint, ...]
    chosen: Mapping[Format, int]


@dataclass(frozen=True)
class PlanFacts:
    """Everything on the page of a plan; sections that the method has no numbers for are None.

    `curves` and `spectra` have the matrices that are shown in full, and `rule` says which these
    are where they are not all. `alphas` has the tail exponent of every matrix.
    """

    model: str
    layer_types: tuple[str, ...]
    plan: BitPlan
    groups: tuple[GroupFacts, ...]
    tensors: tuple[TensorFacts, ...]
    alphas: Mapping[str, float]
    spectra: Mapping[str, Spectrum]
    rule: str | None
    kinds: tuple[KindCurve, ...] | None
    curves: Mapping[str, tuple[CurvePoint, ...]] | None
    ladder: Ladder | None

    @property
    def unused(self) -> int | None:
        """Bytes that the plan leaves of its budget; None without a budget."""
        limit = self.plan.limit_nbytes
        return None if limit is None else limit - self.plan.nbytes


def gather_plan(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    plan: BitPlan,
    measured: Mapping[str, Measured] | None,
    progress: Callable[[str], None],
) -> PlanFacts:
    """Facts about `plan`, made from `checkpoint` for `capabilities`.

    `measured` is what "auto" knew when it chose, None for methods that measure no costs. Reads
    every matrix once, for its spectrum, and measures no costs.
    """
    tensors = tuple(tensor_facts(row) for row in plan.rows)
    matrices = [t.row.name for t in tensors if t.quantizable]
    spectra = spectra_of(checkpoint, matrices, progress)
    full, rule = shown(spectra)
    kinds, curves, steps = None, None, None
    if measured is not None:
        kinds = _kinds([t for t in tensors if t.quantizable], measured)
        curves = {name: _curve(plan.row(name).shape, measured[name]) for name in full}
        floats = sum(t.row.nbytes for t in tensors if not t.quantizable)
        steps = ladder(checkpoint, capabilities, measured, plan.graph_nbytes + floats, progress)
    return PlanFacts(
        model=checkpoint.name,
        layer_types=checkpoint.config.layer_types,
        plan=plan,
        groups=_groups(tensors),
        tensors=tensors,
        alphas={name: spectrum.alpha for name, spectrum in spectra.items()},
        spectra={name: spectra[name] for name in full},
        rule=rule,
        kinds=kinds,
        curves=curves,
        ladder=steps,
    )


def tensor_facts(row: PlanRow) -> TensorFacts:
    """A plan's row, and where it stands in the model."""
    return TensorFacts(
        row,
        place(row.name),
        group(row.name, row.role),
        parse_format(row.format),
        prod(row.shape),
        row.role in QUANTIZED,
    )


def _groups(tensors: tuple[TensorFacts, ...]) -> tuple[GroupFacts, ...]:
    """Groups that the model has, in the order of `GROUPS`."""
    found = []
    for name in GROUPS:
        own = [t for t in tensors if t.group == name]
        if own:
            nbytes, params = sum(t.row.nbytes for t in own), sum(t.numel for t in own)
            found.append(GroupFacts(name, len(own), nbytes, params))
    return tuple(found)


def _curve(shape: tuple[int, ...], known: Measured) -> tuple[CurvePoint, ...]:
    params = shape[0] * shape[1]
    return tuple(
        CurvePoint(f, 8 * f.nbytes(shape) / params, error, known.costs[f])
        for f, error in known.errors.items()
    )


def _kinds(matrices: list[TensorFacts], measured: Mapping[str, Measured]) -> tuple[KindCurve, ...]:
    """Curves of kinds, in the order of `GROUPS` and within it of the checkpoint."""
    found: dict[str, list[TensorFacts]] = {}
    for tensor in sorted(matrices, key=lambda t: GROUPS.index(t.group)):
        found.setdefault(tensor.place.kind, []).append(tensor)
    kinds = []
    for kind, own in found.items():
        each = [_curve(t.row.shape, measured[t.row.name]) for t in own]
        points = tuple(
            CurvePoint(
                points[0].format,
                sum(p.bits_per_weight * t.numel for p, t in zip(points, own, strict=True))
                / sum(t.numel for t in own),
                sum(p.error for p in points) / len(own),
                sum(p.cost for p in points) / len(own),
            )
            for points in zip(*each, strict=True)
        )
        chosen: dict[Format, int] = {}
        for tensor in own:
            if isinstance(tensor.format, Format):
                chosen[tensor.format] = chosen.get(tensor.format, 0) + 1
        kinds.append(KindCurve(kind, points, chosen))
    return tuple(kinds)
