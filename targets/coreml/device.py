"""Run a package by Apple's own runtime, which requires a Mac."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import UnsupportedError
from lfmc.targets.coreml.library import coremltools
from lfmc.targets.coreml.names import DECODE, PREFILL, output_name
from lfmc.targets.coreml.package import PACKAGE


class Device:
    """The functions of a package in Core ML, with the methods of `Interpreter`.

    Both functions use the state that `decode` made. Requires macOS 15 or later; raises
    `UnsupportedError` on other systems.
    """

    def __init__(self, folder: Path) -> None:
        if platform.system() != "Darwin":
            raise UnsupportedError(
                "Core ML runs on Apple's systems only",
                got=platform.system(),
                todo="use the interpreter of lfmc, which runs packages on this machine",
            )
        ct = coremltools()
        path, units = str(folder / PACKAGE), ct.ComputeUnit.CPU_AND_GPU
        self._models: dict[str, Any] = {
            name: ct.models.MLModel(path, compute_units=units, function_name=name)
            for name in (DECODE, PREFILL)
        }
        self.metadata = dict(self._models[DECODE].user_defined_metadata)

    def new_state(self) -> Any:
        """Return a new MLState."""
        return self._models[DECODE].make_state()

    def new_io_states(self) -> dict[str, Tensor]:
        """Return zeros for every state that is passed as an input and an output."""
        (function,) = (
            f for f in self._models[DECODE].get_spec().description.functions if f.name == DECODE
        )
        outputs = {feature.name for feature in function.output}
        return {
            feature.name: torch.zeros(tuple(feature.type.multiArrayType.shape), dtype=torch.float16)
            for feature in function.input
            if output_name(feature.name) in outputs
        }

    def call(
        self, name: str, inputs: Mapping[str, Tensor], state: Any, watch: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Run a function, update `state`, and return its outputs. Core ML can't return `watch`."""
        arrays = {key: value.numpy() for key, value in inputs.items()}
        outputs = self._models[name].predict(arrays, state=state)
        return {key: torch.from_numpy(value) for key, value in outputs.items()}
