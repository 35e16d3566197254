"""Facts for the page about a plan: numbers only, from the checkpoint and the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from lfmc.calib_free.auto.budget_ladder import Ladder, compute_ladder
from lfmc.calib_free.auto.method import MatrixCosts
from lfmc.calib_free.grid.formats import Capabilities, Floats, Format, parse_format
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.roles import QUANTIZED_ROLES
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.report.spectrum_facts import Spectrum, select_for_display, spectra_of
from lfmc.report.tensor_labels import GROUPS, Place, group, place


@dataclass(frozen=True)
class TensorFacts:
    """A stored tensor: its row of the plan and its place in the model.

    `quantizable` means that the tensor is a matrix whose format a method can choose.
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
    """A matrix in one format: bits per weight with scales, error, and cost in nats per token.

    `error` is the weighted squared error over the weighted energy.
    """

    format: Format
    bits_per_weight: float
    error: float
    cost: float


@dataclass(frozen=True)
class KindCurve:
    """Matrices of one kind: means per format, and the number of matrices per planned format."""

    kind: str
    points: tuple[CurvePoint, ...]
    counts: Mapping[Format, int]


@dataclass(frozen=True)
class PlanFacts:
    """All facts on the page of a plan.

    `curves` and `spectra` have the matrices that the page shows in full. `rule` describes the
    selection, or is None if all matrices are shown. `alphas` has the tail exponent of every
    matrix. `kinds`, `curves` and `ladder` are None if the method measured no costs.
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
        """Bytes of the budget that the plan does not use; None without a budget."""
        limit = self.plan.limit_nbytes
        return None if limit is None else limit - self.plan.nbytes


def gather_plan(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    plan: BitPlan,
    measured: Mapping[str, MatrixCosts] | None,
    progress: Callable[[str], None],
) -> PlanFacts:
    """Gather facts about `plan`, which was made from `checkpoint` for `capabilities`.

    `measured` has the costs that "auto" measured; None for methods that measure no costs. This
    function reads every matrix once, for its spectrum, and measures no costs.
    """
    tensors = tuple(tensor_facts(row) for row in plan.rows)
    matrices = [t.row.name for t in tensors if t.quantizable]
    spectra = spectra_of(checkpoint, matrices, progress)
    names, rule = select_for_display(spectra)
    kinds, curves, ladder = None, None, None
    if measured is not None:
        kinds = _kinds([t for t in tensors if t.quantizable], measured)
        curves = {name: _curve(plan.row(name).shape, measured[name]) for name in names}
        float_nbytes = sum(t.row.nbytes for t in tensors if not t.quantizable)
        ladder = compute_ladder(
            checkpoint, capabilities, measured, plan.graph_nbytes + float_nbytes, progress
        )
    return PlanFacts(
        model=checkpoint.name,
        layer_types=checkpoint.config.layer_types,
        plan=plan,
        groups=_groups(tensors),
        tensors=tensors,
        alphas={name: spectrum.alpha for name, spectrum in spectra.items()},
        spectra={name: spectra[name] for name in names},
        rule=rule,
        kinds=kinds,
        curves=curves,
        ladder=ladder,
    )


def tensor_facts(row: PlanRow) -> TensorFacts:
    """Return the facts of a plan's row."""
    return TensorFacts(
        row,
        place(row.name),
        group(row.name, row.role),
        parse_format(row.format),
        prod(row.shape),
        row.role in QUANTIZED_ROLES,
    )


def _groups(tensors: tuple[TensorFacts, ...]) -> tuple[GroupFacts, ...]:
    """Return the groups that the model has, in the order of `GROUPS`."""
    groups = []
    for name in GROUPS:
        members = [t for t in tensors if t.group == name]
        if members:
            nbytes, params = sum(t.row.nbytes for t in members), sum(t.numel for t in members)
            groups.append(GroupFacts(name, len(members), nbytes, params))
    return tuple(groups)


def _curve(shape: tuple[int, ...], measured: MatrixCosts) -> tuple[CurvePoint, ...]:
    params = shape[0] * shape[1]
    return tuple(
        CurvePoint(f, 8 * f.nbytes(shape) / params, error, measured.costs[f])
        for f, error in measured.errors.items()
    )


def _kinds(
    matrices: list[TensorFacts], measured: Mapping[str, MatrixCosts]
) -> tuple[KindCurve, ...]:
    """Return the mean curves of kinds, in the order of `GROUPS`, then of the checkpoint."""
    tensors_by_kind: dict[str, list[TensorFacts]] = {}
    for tensor in sorted(matrices, key=lambda t: GROUPS.index(t.group)):
        tensors_by_kind.setdefault(tensor.place.kind, []).append(tensor)
    kinds = []
    for kind, tensors in tensors_by_kind.items():
        curves = [_curve(t.row.shape, measured[t.row.name]) for t in tensors]
        points = tuple(
            CurvePoint(
                points[0].format,
                sum(p.bits_per_weight * t.numel for p, t in zip(points, tensors, strict=True))
                / sum(t.numel for t in tensors),
                sum(p.error for p in points) / len(tensors),
                sum(p.cost for p in points) / len(tensors),
            )
            for points in zip(*curves, strict=True)
        )
        counts: dict[Format, int] = {}
        for tensor in tensors:
            if isinstance(tensor.format, Format):
                counts[tensor.format] = counts.get(tensor.format, 0) + 1
        kinds.append(KindCurve(kind, points, counts))
    return tuple(kinds)
