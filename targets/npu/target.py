"""The base class of the accelerator targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from lfmc.graph.program import Program
from lfmc.graph.trace import TraceSpec
from lfmc.model import DecoderConfig
from lfmc.run.conversation import ConversationModel
from lfmc.targets.base import Request, StoredTensor
from lfmc.targets.npu.constants import HOST


@dataclass(frozen=True)
class GraphSize:
    """Measured bytes of the graphs and the host's facts, with a margin.

    `base` is constant, `layer` is added for each layer and `expert` for each expert. `sandwich` is
    added for each layer with norms behind its blocks and gated heads.
    """

    base: int
    layer: int
    sandwich: int
    expert: int

    def estimate_nbytes(self, config: DecoderConfig) -> int:
        layer = self.layer + (self.sandwich if config.sandwich_norm else 0)
        return self.base + layer * config.num_layers + self.expert * config.total_num_experts


class NpuTarget:
    """Target methods that all accelerators share."""

    exact: ClassVar[bool] = False

    def trace_spec(self, config: DecoderConfig, request: Request) -> TraceSpec:
        return TraceSpec(context=request.context, batch=1, length=None)

    def read_tensor(self, folder: Path, stored: StoredTensor) -> Tensor:
        from lfmc.targets.npu.bundle import HOST_FILE
        from lfmc.targets.npu.constants import read_tensor
        from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters

        file = HOST_FILE if stored.name.startswith(HOST) else PARAMETERS
        return read_tensor(open_parameters(folder, file), stored)

    def reference(
        self, program: Program, request: Request, folder: Path, *, exact: bool
    ) -> ConversationModel:
        from lfmc.targets.npu.parity import make_reference

        return make_reference(program, folder)

    def tolerance(self, program: Program, *, exact: bool) -> float | None:
        return None
