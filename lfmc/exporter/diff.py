"""What two bundles or plans differ in: formats by tensor, sizes, quality, versions, activations."""

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
from lfmc.exporter.reverify import bundled_plan
from lfmc.machine.progress import Progress
from lfmc.model import Decoder
from lfmc.parity.module_outputs import module_outputs
from lfmc.report.tensor_labels import group
from lfmc.run.stepper import decoder_stepper
from lfmc.verification.rungs import WINDOW, WINDOWS, passages

APART = 0.05  # of the float stream: from there on two plans are said to part
PLANNED = ("target", "method", "effort", "seed", "limit_nbytes", "fingerprint")
BUNDLED = ("lfmc", "context", "check", "judged_on", "not_executed")


@dataclass(frozen=True)
class Side:
    """One of the two: a plan, and the bundle that it lies in, if it does."""

    path: Path
    plan: BitPlan
    bundle: Bundle | None

    def facts(self) -> dict[str, Any]:
        """What it was made by and for; a plan alone knows less."""
        found: dict[str, Any] = {name: getattr(self.plan, name) for name in PLANNED}
        if self.bundle is not None:
            manifest = self.bundle.manifest
            found |= {name: manifest.get(name) for name in BUNDLED}
            for section in ("options", "versions", "tokens"):
                found |= {f"{section}.{k}": v for k, v in manifest.get(section, {}).items()}
        return found

    def numbers(self) -> dict[str, float | None]:
        """Sizes, and what was measured."""
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
class Changed:
    """A tensor that is stored otherwise; `first` and `second` are None where one has no row."""

    name: str
    group: str
    first: str | None
    second: str | None
    nbytes: int


@dataclass(frozen=True)
class Stream:
    """How far the residual streams behind a part of the model are from each other, and each from
    the float model's, over the latter's size (root mean square over tokens)."""

    part: str
    between: float
    first: float
    second: float


@dataclass(frozen=True)
class Difference:
    """All that two sides differ in. `facts` and `numbers` have a pair for each name; of `numbers`
    all are there, and None is what a side does not know. `parts_at` is the first part of the model
    behind which the streams are more than `apart` from each other."""

    tensors: int
    changed: tuple[Changed, ...]
    facts: Mapping[str, tuple[Any, Any]]
    numbers: Mapping[str, tuple[float | None, float | None]]
    apart: float
    streams: tuple[Stream, ...] = ()

    @property
    def parts_at(self) -> str | None:
        return next((own.part for own in self.streams if own.between > self.apart), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "parts_at": self.parts_at}


def open_side(path: Path) -> Side:
    """A bundle's folder, or the file of a plan; raises `InputError` where it is neither."""
    if path.is_dir():
        bundle = open_bundle(path)
        text = (path / PLAN).read_text(encoding="utf-8")
        return Side(path, BitPlan.from_json(text), bundle)
    return Side(path, BitPlan.load(path), None)


def difference(first: Side, second: Side, apart: float = APART) -> Difference:
    """Compare what is written in plans and manifests; no tensor is read."""
    rows = [{row.name: row for row in side.plan.rows} for side in (first, second)]
    names = list(dict.fromkeys([*rows[0], *rows[1]]))
    pairs = [(rows[0].get(name), rows[1].get(name)) for name in names]
    facts = _pairs(first.facts(), second.facts())
    return Difference(
        len(names),
        tuple(_changed(a, b) for a, b in pairs if _stored(a) != _stored(b)),
        {name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        _pairs(first.numbers(), second.numbers()),
        apart,
    )


def with_activations(
    found: Difference, first: Side, second: Side, checkpoint: Checkpoint, progress: Progress
) -> Difference:
    """The same, with both plans' weights run in torch on the bundled passages.

    Raises `InputError` where a plan is not of this checkpoint.
    """
    length = min(WINDOW, checkpoint.config.max_context)
    tokens = passages(checkpoint, length, WINDOWS["fast"])
    progress.step("float32")
    reference = _streams(checkpoint.decoder(), tokens)
    made = []
    for side in (first, second):
        progress.step(str(side.path))
        weights = dequantized_weights(checkpoint, _whole_plan(side, checkpoint))
        made.append(_streams(checkpoint.decoder(weights), tokens))
    streams = [
        Stream(
            part,
            _distance(made[0][part], made[1][part], floats),
            _distance(made[0][part], floats, floats),
            _distance(made[1][part], floats, floats),
        )
        for part, floats in reference.items()
    ]
    return replace(found, streams=tuple(streams))


def _whole_plan(side: Side, checkpoint: Checkpoint) -> BitPlan:
    """The plan with what was fitted; of a bundle that lies in the artifact."""
    if side.plan.fingerprint != checkpoint.fingerprint:
        raise InputError(
            "the plan was made from another checkpoint",
            where=side.path,
            expected=f"fingerprint {side.plan.fingerprint[:16]}...",
            got=f"{checkpoint.fingerprint[:16]}...",
        )
    return side.plan if side.bundle is None else bundled_plan(side.bundle, checkpoint)


def _streams(decoder: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """The residual stream `[N * T, H]` behind the embedding and every layer, of texts `[N, T]`."""
    layers = range(len(decoder.model.layers))
    parts = {"model.embed_tokens": "embedding"}
    parts |= {f"model.layers.{index}": f"layer {index}" for index in layers}
    stepper = decoder_stepper(decoder, tokens.shape[1])
    with module_outputs(decoder, parts) as found:
        for text in tokens:
            stepper.reset()
            stepper.step(text)
    return {parts[name]: torch.cat(values).flatten(0, 1) for name, values in found.items()}


def _distance(left: Tensor, right: Tensor, floats: Tensor) -> float:
    return float((left - right).norm() / floats.norm().clamp_min(1e-30))


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys([*first, *second])
    return {name: (first.get(name), second.get(name)) for name in names}


def _changed(first: PlanRow | None, second: PlanRow | None) -> Changed:
    row = first or second
    assert row is not None  # a name comes from one of the two
    nbytes = (second.nbytes if second else 0) - (first.nbytes if first else 0)
    return Changed(row.name, group(row.name, row.role), _stored(first), _stored(second), nbytes)


def _stored(row: PlanRow | None) -> str | None:
    """How a tensor is stored, in a word that is another for other codes."""
    if row is None:
        return None
    grid = "" if row.grid == "none" else f", {row.grid}"
    return row.format + grid + ("" if row.digest is None else f" {row.digest[:8]}")
