"""Reads every tensor back from disk and compares it with the plan, bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.calib_free.plan.planned_tensors import stored_error
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import GateError
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.lowering.build import Build
from lfmc.parity.place import Place, stored_tensor_place
from lfmc.targets.base import Artifact, StoredTensor, Target

READ_BACK_PARTS = ("tensor", "error of tensor")  # counted steps: see `Progress.stage`


def read_back(
    export_build: Build,
    folder: Path,
    artifact: Artifact,
    progress: Callable[[str], None] = lambda detail: None,
) -> dict[str, float]:
    """Compare every tensor on disk with the plan, bit for bit; raise `GateError` for a difference.

    Returns the measured error of each quantized tensor, as computed by
    `calib_free.plan.planned_tensors.stored_error`.
    """
    weights = export_build.weights
    counts: Counter[tuple[str, str]] = Counter()
    total = len(_group_pieces(artifact.tensors))
    stored_tensors = _read_stored_tensors(export_build.target, folder, artifact.tensors)
    for index, (stored, tensor) in enumerate(stored_tensors):
        progress(f"tensor {index + 1} of {total}")
        for name, value in _split_sources(tensor, stored, weights.checkpoint):
            planned = _planned_part(weights, name, stored.part)
            if value.dtype != planned.dtype or not torch.equal(value, planned):
                raise GateError(
                    f"the {stored.part} of '{name}' on disk differ from the plan",
                    where=f"{folder}: {stored.name}",
                    todo="this artifact is wrong; please report it",
                ).at(stored_tensor_place(name, stored.part, value, planned))
            counts[name, stored.part] += 1
    expected = {(row.name, part) for row in weights.plan.rows for part in weights.parts(row.name)}
    stored_parts = set(counts)
    if stored_parts != expected or max(counts.values()) > 1:
        wrong = sorted(stored_parts ^ expected) or [key for key, n in counts.items() if n > 1]
        raise GateError(
            "the artifact does not contain every planned tensor exactly once",
            where=f"{folder}: {wrong[0]}",
            expected=f"{len(expected)} pieces",
            got=f"{sum(counts.values())}",
            todo="this artifact is wrong; please report it",
        ).at(_place_of_count_error(*wrong[0], wrong[0] in stored_parts))
    errors = {}
    quantized = sorted(name for name, part in stored_parts if part == "codes")
    for index, name in enumerate(quantized):
        progress(f"error of tensor {index + 1} of {len(quantized)}")
        packed = weights.packed((name,))
        errors[name] = stored_error(weights.checkpoint, weights.plan, name, packed)
    return errors


def _place_of_count_error(name: str, part: str, is_stored: bool) -> Place:
    """Return the place of a tensor that is missing, is not in the plan, or is stored twice."""
    note = "it is stored, but not as planned: once" if is_stored else "it is not in the artifact"
    return Place(3, "stored tensor", part, name, math.inf, 0.0, weights=(name,), note=note)


def read_stored_parts(
    target: Target,
    folder: Path,
    artifact: Artifact,
    checkpoint: Checkpoint,
    names: frozenset[str],
) -> dict[str, dict[str, Tensor]]:
    """Read the parts of the tensors `names` from the artifact, in the form of `BitPlan.fitted`."""
    fitted: dict[str, dict[str, Tensor]] = {}
    stored_tensors = [stored for stored in artifact.tensors if not names.isdisjoint(stored.sources)]
    for stored, tensor in _read_stored_tensors(target, folder, stored_tensors):
        for name, value in _split_sources(tensor, stored, checkpoint):
            if name in names:
                fitted.setdefault(name, {})[stored.part] = value
    return fitted


def _read_stored_tensors(
    target: Target, folder: Path, tensors: Iterable[StoredTensor]
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Yield every stored tensor and its value; the pieces of one tensor are concatenated."""
    for pieces in _group_pieces(tensors):
        values = [target.read_tensor(folder, piece) for piece in pieces]
        yield pieces[0], values[0] if len(values) == 1 else torch.cat(values)


def _group_pieces(tensors: Iterable[StoredTensor]) -> list[list[StoredTensor]]:
    """Return the pieces of each stored tensor, in order."""
    groups: dict[tuple[Any, ...], list[StoredTensor]] = {}
    for stored in tensors:
        groups.setdefault((stored.sources, stored.part), []).append(stored)
    return list(groups.values())


def _planned_part(weights: PlannedWeights, name: str, part: str) -> Tensor:
    if part == "values":
        return weights.floats((name,))
    packed = weights.packed((name,))
    if part == "codes":
        return packed.packed_codes()
    if part == "scales":
        return packed.scales
    zeros = packed.packed_zeros()
    if zeros is None:
        raise GateError(f"'{name}' has zero points on disk, but none in the plan")
    return zeros


def _split_sources(
    value: Tensor, stored: StoredTensor, checkpoint: Checkpoint
) -> list[tuple[str, Tensor]]:
    """Split a stored tensor into the checkpoint's tensors, by name."""
    if stored.arrangement == "rows":
        rows = [checkpoint.tensors[name].shape[0] for name in stored.sources]
        pieces = list(value.split(rows))
    elif stored.arrangement == "experts":
        pieces = list(value.unbind(0))
    else:  # interleaved gate and up rows
        pieces = [half for expert in value.unbind(0) for half in (expert[0::2], expert[1::2])]
    return list(zip(stored.sources, pieces, strict=True))
