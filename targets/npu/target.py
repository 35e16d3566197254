"""What accelerators' targets have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lfmc.model import DecoderConfig
from lfmc.targets.base import StoredTensor
from lfmc.targets.npu.constants import HOST


@dataclass(frozen=True)
class GraphSize:
    """Bytes of graphs and of what the host is told, measured, with a margin: at all, a layer, more
    with a norm behind each block and a gate of the heads, and an expert."""

    base: int
    layer: int
    sandwich: int
    expert: int

    def of(self, config: DecoderConfig) -> int:
        layer = self.layer + (self.sandwich if config.sandwich_norm else 0)
        return self.base + layer * config.num_layers + self.expert * config.num_experts_in_all


def read_tensor(folder: Path, stored: StoredTensor) -> Tensor:
    """A stored tensor as the plan has it."""
    from lfmc.targets.npu.bundle import HOST_FILE
    from lfmc.targets.npu.constants import read
    from lfmc.targets.parameters import PARAMETERS, open_parameters

    file = HOST_FILE if stored.name.startswith(HOST) else PARAMETERS
    return read(open_parameters(folder, file), stored)
