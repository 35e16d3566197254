"""Compares two bundles or plans: formats by tensor, sizes, quality, versions and activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.bundle.bundle import PLAN, Bundle, open_bundle
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.exporter.reverify import read_bundled_plan
from lfmc.machine.progress import Progress
from lfmc.reference.layerwise_decoder import LayerwiseDecoder
from lfmc.report.tensor_labels import group
from lfmc.run.conversation import Conversation
from lfmc.verification.rungs import WINDOW, WINDOWS, read_passages

STREAM_TOLERANCE = 0.05  # relative to the float stream: above this distance two plans diverge
PLAN_FACTS = ("target", "method", "effort", "seed", "limit_nbytes", "fingerprint")
MANIFEST_FACTS = ("lfmc", "context", "check", "judged_on", "not_executed")


@dataclass(frozen=True)
class DiffInput:
    """One of the two inputs: a plan, and the bundle that contains it (None for a plan file)."""

    path: Path
    plan: BitPlan
    bundle: Bundle | None

    def facts(self) -> dict[str, Any]:
        """Return the settings and versions of the input; a bundle has more than a plan."""
        facts: dict[str, Any] = {name: getattr(self.plan, name) for name in PLAN_FACTS}
        if self.bundle is not None:
            manifest = self.bundle.manifest
            facts |= {name: manifest.get(name) for name in MANIFEST_FACTS}
            for section in ("options", "versions", "tokens"):
                values = manifest.get(section, {})
                facts |= {f"{section}.{key}": value for key, value in values.items()}
        return facts

    def numbers(self) -> dict[str, float | None]:
        """Return sizes and measured quality; None for values that are unknown."""
        report = {} if self.bundle is None else self.bundle.manifest.get("report", {})
        quality = report.get("quality") or {}
        return {
            "bits_per_weight": self.plan.bits_per_weight,
            "plan_nbytes": self.plan.nbytes,
            "artifact_nbytes": None if self.bundle is None else self.bundle.nbytes,
            "predicted_kl": self.plan.predicted_kl,
            "kl": quality.get("kl"),
            "top1": quality.get("top1"),
            "perplexity": quality.get("perplexity"),
        }


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor whose storage differs; `first` or `second` is None if that plan has no such row."""

    name: str
    group: str
    first: str | None
    second: str | None
    nbytes: int


@dataclass(frozen=True)
class StreamDistance:
    """Distances between residual streams after a part of the model.

    `between` is the distance of the two streams from each other, `first` and `second` their
    distances from the stream of the float model. All are relative to the norm of the float stream
    (root mean square over tokens).
    """

    part: str
    between: float
    first: float
    second: float


@dataclass(frozen=True)
class Difference:
    """The differences between two plans or bundles.

    `facts` has a pair of values for each fact that differs. `numbers` has a pair for each number,
    with None for an unknown value. The streams diverge if their distance is above `apart`.
    """

    tensors: int
    changed: tuple[ChangedTensor, ...]
    facts: Mapping[str, tuple[Any, Any]]
    numbers: Mapping[str, tuple[float | None, float | None]]
    apart: float
    streams: tuple[StreamDistance, ...] = ()

    @property
    def diverges_at(self) -> str | None:
        """The first part of the model after which the streams diverge."""
        return next((stream.part for stream in self.streams if stream.between > self.apart), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "parts_at": self.diverges_at}


def open_diff_input(path: Path) -> DiffInput:
    """Open the folder of a bundle or the file of a plan; raises `InputError` for anything else."""
    if path.is_dir():
        bundle = open_bundle(path)
        text = (path / PLAN).read_text(encoding="utf-8")
        return DiffInput(path, BitPlan.from_json(text), bundle)
    return DiffInput(path, BitPlan.load(path), None)


def compare_plans(
    first: DiffInput, second: DiffInput, apart: float = STREAM_TOLERANCE
) -> Difference:
    """Compare plans and manifests, without reading tensors."""
    rows = [{row.name: row for row in source.plan.rows} for source in (first, second)]
    names = list(dict.fromkeys([*rows[0], *rows[1]]))
    pairs = [(rows[0].get(name), rows[1].get(name)) for name in names]
    facts = _pairs(first.facts(), second.facts())
    return Difference(
        len(names),
        tuple(_changed_tensor(a, b) for a, b in pairs if _storage_label(a) != _storage_label(b)),
        {name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        _pairs(first.numbers(), second.numbers()),
        apart,
    )


def compare_activations(
    difference: Difference,
    first: DiffInput,
    second: DiffInput,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Difference:
    """Return the difference with `streams`: both plans' weights run in torch on bundled passages.

    Raises `InputError` for a plan of another checkpoint.
    """
    length = min(WINDOW, checkpoint.config.max_context)
    tokens = read_passages(checkpoint, length, WINDOWS["fast"])
    progress.step("float32")
    reference = _residual_streams(checkpoint, checkpoint.weights, tokens)
    streams = []
    for source in (first, second):
        progress.step(str(source.path))
        weights = dequantized_weights(checkpoint, _full_plan(source, checkpoint))
        streams.append(_residual_streams(checkpoint, weights, tokens))
    distances = [
        StreamDistance(
            part,
            _distance(streams[0][part], streams[1][part], floats),
            _distance(streams[0][part], floats, floats),
            _distance(streams[1][part], floats, floats),
        )
        for part, floats in reference.items()
    ]
    return replace(difference, streams=tuple(distances))


def _full_plan(source: DiffInput, checkpoint: Checkpoint) -> BitPlan:
    """Return the plan with its fitted tensors, which a bundle stores in the artifact."""
    if source.plan.fingerprint != checkpoint.fingerprint:
        raise InputError(
            "the plan was made from another checkpoint",
            where=source.path,
            expected=f"fingerprint {source.plan.fingerprint[:16]}...",
            got=f"{checkpoint.fingerprint[:16]}...",
        )
    return source.plan if source.bundle is None else read_bundled_plan(source.bundle, checkpoint)


def _residual_streams(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], tokens: Tensor
) -> dict[str, Tensor]:
    """Return the residual stream `[N * T, H]` after the embedding and each layer, for `[N, T]`."""
    streams: dict[str, Tensor] = {}

    def observe(part: str, texts: list[Tensor]) -> None:
        streams[part] = torch.cat(texts)

    decoder = LayerwiseDecoder(checkpoint.config, weights, tokens.shape[1], observe=observe)
    decoder.hidden([Conversation((text,)) for text in tokens])
    return streams


def _distance(first: Tensor, second: Tensor, floats: Tensor) -> float:
    return float((first - second).norm() / floats.norm().clamp_min(1e-30))


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names}


def _changed_tensor(first: PlanRow | None, second: PlanRow | None) -> ChangedTensor:
    row = first or second
    assert row is not None  # each name comes from at least one plan
    nbytes = (second.nbytes if second else 0) - (first.nbytes if first else 0)
    return ChangedTensor(
        row.name, group(row.name, row.role), _storage_label(first), _storage_label(second), nbytes
    )


def _storage_label(row: PlanRow | None) -> str | None:
    """Return a label of a tensor's storage, which includes a digest of fitted codes."""
    if row is None:
        return None
    grid = "" if row.grid == "none" else f", {row.grid}"
    return row.format + grid + ("" if row.digest is None else f" {row.digest[:8]}")
