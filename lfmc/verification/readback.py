"""What is on disk, taken apart again and compared with the plan bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.calib_free.plan.planned_tensors import stored_error
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.lowering.build import Build
from lfmc.parity.place import Place, stored_place
from lfmc.targets.base import Artifact, StoredTensor, Target


def read_back(made: Build, folder: Path, artifact: Artifact) -> dict[str, float]:
    """Compare every tensor on disk with the plan, bit for bit; raise `GateError` for a difference.

    Returns each quantized tensor's measured error, as `calib_free.planned.stored_error` has it.
    """
    weights = made.weights
    seen: Counter[tuple[str, str, int]] = Counter()
    for stored, whole in _stored(made.target, folder, artifact.tensors):
        for name, value in _parts(whole, stored, weights.checkpoint):
            planned = _planned(weights, name, stored.part)
            if value.dtype != planned.dtype or not torch.equal(value, planned):
                raise GateError(
                    f"the {stored.part} of '{name}' on disk are not the plan's",
                    where=f"{folder}: {stored.name}",
                    todo="this artifact is wrong; please report it",
                ).at(stored_place(name, stored.part, value, planned))
            seen[name, stored.part, stored.copy] += 1
    expected = {(row.name, part) for row in weights.plan.rows for part in weights.parts(row.name)}
    found = {(name, part) for name, part, _ in seen}
    if found != expected or max(seen.values()) > 1:
        wrong = sorted(found ^ expected) or [key[:2] for key, n in seen.items() if n > 1]
        raise GateError(
            "the artifact does not hold every planned tensor exactly once",
            where=f"{folder}: {wrong[0]}",
            expected=f"{len(expected)} pieces",
            got=f"{sum(seen.values())}",
            todo="this artifact is wrong; please report it",
        ).at(_uncounted(*wrong[0], wrong[0] in found))
    return {
        name: stored_error(weights.checkpoint, weights.plan, name, weights.packed((name,)))
        for name in sorted(name for name, part in found if part == "codes")
    }


def _uncounted(name: str, part: str, is_there: bool) -> Place:
    """The place of a tensor that is not stored, or that no plan asks for."""
    note = "it is stored, but not as planned: once" if is_there else "it is not in the artifact"
    return Place(3, "stored tensor", part, name, math.inf, 0.0, weights=(name,), note=note)


def stored_parts(
    target: Target,
    folder: Path,
    artifact: Artifact,
    checkpoint: Checkpoint,
    names: frozenset[str],
) -> dict[str, dict[str, Tensor]]:
    """The parts of tensors `names` as they lie in the artifact, as `BitPlan.fitted` has them."""
    found: dict[str, dict[str, Tensor]] = {}
    wanted = [stored for stored in artifact.tensors if not names.isdisjoint(stored.sources)]
    for stored, whole in _stored(target, folder, wanted):
        for name, value in _parts(whole, stored, checkpoint):
            if name in names:
                found.setdefault(name, {})[stored.part] = value
    return found


def _stored(
    target: Target, folder: Path, tensors: Iterable[StoredTensor]
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The stored tensors and what they hold; those that are in pieces as a whole."""
    groups: dict[tuple[Any, ...], list[StoredTensor]] = {}
    for stored in tensors:
        groups.setdefault((stored.sources, stored.part, stored.copy), []).append(stored)
    for pieces in groups.values():
        found = [target.read_tensor(folder, piece) for piece in pieces]
        yield pieces[0], found[0] if len(found) == 1 else torch.cat(found)


def _planned(weights: PlannedWeights, name: str, part: str) -> Tensor:
    if part == "values":
        return weights.floats((name,))
    packed = weights.packed((name,))
    if part == "codes":
        return packed.packed_codes()
    if part == "scales":
        return packed.scales
    zeros = packed.packed_zeros()
    if zeros is None:
        raise GateError(f"'{name}' has zero points on disk and none in the plan")
    return zeros


def _parts(value: Tensor, stored: StoredTensor, checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    """A stored tensor taken apart into the checkpoint's tensors that it holds."""
    if stored.arrangement == "rows":
        rows = [checkpoint.tensors[name].shape[0] for name in stored.sources]
        pieces = list(value.split(rows))
    elif stored.arrangement == "experts":
        pieces = list(value.unbind(0))
    else:  # gate and up rows in turn
        pieces = [half for expert in value.unbind(0) for half in (expert[0::2], expert[1::2])]
    return list(zip(stored.sources, pieces, strict=True))
