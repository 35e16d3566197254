"""A stepper that runs a module in IREE's runtime, as an app does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import InputError, first_line
from lfmc.run.stepper import require_tokens
from lfmc.targets.base import require
from lfmc.targets.mlir.devices import DEVICES
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters

MODULE = "model.vmfb"
RESET = "reset"
SCOPE = "model"  # of the parameters


class IreeStepper:
    """One conversation with a module; `reset` fills the states with zeros."""

    def __init__(self, folder: Path) -> None:
        require("iree.runtime", "mlir")
        facts = open_parameters(folder).facts
        self.context, self._vocab_size = int(facts["context"]), int(facts["vocab_size"])
        self._lengths: list[int] = facts["lengths"]
        path = folder / MODULE
        if not path.is_file():
            raise InputError("there is no module", where=path)
        try:
            self._functions = _load(folder, DEVICES[facts["device"]].driver)
        except Exception as error:  # IREE raises whatever its loader raises
            raise InputError(
                "IREE's runtime can't load the module",
                where=path,
                got=first_line(error),
                todo="it may be damaged, of another bundle, or of another version of IREE",
            ) from error
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self._length = 0
        self._functions[RESET]()

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append tokens and return their float32 logits `[T, V]`."""
        pieces = self._split_calls(tokens)
        return torch.cat([self._call("score", piece) for piece in pieces])

    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append tokens and return the float32 logits `[1, V]` of the last token."""
        for piece in self._split_calls(tokens):
            logits = self._call("prefill", piece)
        return logits

    def _split_calls(self, tokens: Sequence[int] | Tensor) -> list[Tensor]:
        """Split tokens into calls of the lengths that the module has functions for."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab_size)
        calls, start = [], 0
        while start < len(ids):
            size = next(n for n in self._lengths if n <= len(ids) - start)
            calls.append(ids[start : start + size])
            start += size
        return calls

    def _call(self, name: str, ids: Tensor) -> Tensor:
        function = self._functions["decode" if len(ids) == 1 else f"{name}_{len(ids)}"]
        start = np.array([self._length], np.int32)
        logits = function(ids.int().numpy(), start)
        self._length += len(ids)
        return torch.from_numpy(_copy_to_host(logits))


def _copy_to_host(array: Any) -> Any:
    """Copy an IREE array to numpy.

    IREE's own conversion imports numpy's memory, which Vulkan drivers reject unless it is aligned
    to a page.
    """
    import iree.runtime as runtime

    device, view = array._device, array._buffer_view
    source, semaphore = view.get_buffer(), device.create_semaphore(0)
    staging = device.allocator.allocate_buffer(
        memory_type=int(runtime.MemoryType.HOST_LOCAL | runtime.MemoryType.DEVICE_VISIBLE),
        allowed_usage=int(runtime.BufferUsage.TRANSFER_TARGET | runtime.BufferUsage.MAPPING_SCOPED),
        allocation_size=source.byte_length(),
    )
    before, after = (runtime.HalFence.create_at(semaphore, step) for step in (0, 1))
    device.queue_copy(source, staging, wait_semaphores=before, signal_semaphores=after)
    after.wait()
    return np.array(staging.map().asarray(view.shape, np.dtype(np.float32)))


def _load(folder: Path, driver: str) -> Any:
    """Load the module with mapped parameters; return its functions by name."""
    import iree.runtime as runtime

    config = runtime.Config(driver)
    index = runtime.ParameterIndex()
    index.load(str(folder / PARAMETERS))
    provider = index.create_provider(scope=SCOPE)
    modules = [
        runtime.create_io_parameters_module(config.vm_instance, provider),
        runtime.create_hal_module(config.vm_instance, config.device),
        runtime.VmModule.mmap(config.vm_instance, str(folder / MODULE)),
    ]
    context = runtime.SystemContext(vm_modules=modules, config=config)
    return context.modules[modules[-1].name]
