"""Facts for the page about a checkpoint: numbers only, without reading its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lfmc.calib_free.plan.roles import tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.footprint import Footprint, footprint, footprints
from lfmc.model import DecoderConfig

CURVE_POINTS = 64


@dataclass(frozen=True)
class ModelFacts:
    """Layers by type, parameters by role, and memory at some context lengths.

    `memory` has the rows of the table. `curve` has evenly spaced lengths up to the maximum.
    """

    name: str
    config: DecoderConfig
    parameters: int
    tensors: int
    layers: Mapping[str, int]
    roles: Mapping[str, int]
    memory: tuple[Footprint, ...]
    curve: tuple[Footprint, ...]


def gather_model(checkpoint: Checkpoint) -> ModelFacts:
    """Gather facts from the configuration and the tensor shapes of a checkpoint."""
    config = checkpoint.config
    roles: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        roles[tensor_role(info.name, info.shape)] += info.numel
    longest = config.max_context
    lengths = {max(1, longest * n // CURVE_POINTS) for n in range(CURVE_POINTS + 1)}
    lengths |= {min(config.sliding_window, longest)} - {0}  # the curve has a bend at the window
    return ModelFacts(
        name=checkpoint.name,
        config=config,
        parameters=checkpoint.num_params,
        tensors=len(checkpoint.tensors),
        layers=dict(Counter(config.layer_types)),
        roles=dict(roles),
        memory=tuple(footprints(checkpoint)),
        curve=tuple(footprint(checkpoint, n) for n in sorted(lengths)),
    )
