"""What accelerators' targets have in common."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lfmc.model import DecoderConfig
from lfmc.targets.base import StoredTensor
from lfmc.targets.npu.constants import HOST

# Bytes of both graphs, and of what the host is told. Measured, with a margin.
GRAPH = 60_000
GRAPH_PER_LAYER = 45_000
GRAPH_PER_SANDWICH = 15_000  # more, with a norm behind each block, and a gate of the heads
GRAPH_PER_EXPERT = 11_000


def graph_nbytes(config: DecoderConfig) -> int:
    per_layer = GRAPH_PER_LAYER + (GRAPH_PER_SANDWICH if config.sandwich_norm else 0)
    experts = GRAPH_PER_EXPERT * config.num_experts_in_all
    return GRAPH + per_layer * config.num_layers + experts


def read_tensor(folder: Path, stored: StoredTensor) -> Tensor:
    """A stored tensor as the plan has it."""
    from lfmc.targets.npu.bundle import HOST_FILE
    from lfmc.targets.npu.constants import read
    from lfmc.targets.parameters import PARAMETERS, open_parameters

    file = HOST_FILE if stored.name.startswith(HOST) else PARAMETERS
    return read(open_parameters(folder, file), stored)
