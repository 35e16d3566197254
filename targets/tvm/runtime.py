"""Run a library with TVM's runtime, as an app does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import InputError, UnsupportedError, first_line
from lfmc.run.stepper import require_tokens
from lfmc.targets.base import require
from lfmc.targets.shared.parameters_file import ALIGNMENT, Parameters, open_parameters
from lfmc.targets.tvm.kernels.cpus import machine_flags

LIBRARY = "model.so"


def use_all_cores() -> None:
    """Set TVM's number of threads to the number of cores, unless the user set it.

    By default TVM uses half of the CPUs of an x86 machine, as if each CPU were half of a core, and
    binds the calling thread to one CPU: threads that the calling thread starts later would share
    this CPU. TVM reads these variables once, when it first runs code in parallel.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def cores() -> int:
    """Return the number of cores that this process may use; a core with several hardware threads
    counts once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    allowed = os.sched_getaffinity(0)
    paths = [Path(topology.format(cpu)) for cpu in allowed]
    if not all(path.is_file() for path in paths):
        return len(allowed)
    return len({path.read_text() for path in paths})


def _find_device(tvm: Any, requirements: Mapping[str, Any], path: Path) -> Any:
    """Return TVM's device for a library. Raises `UnsupportedError` if this machine lacks the
    device."""
    missing = sorted(set(requirements.get("needs", ())) - machine_flags())
    device = tvm.device(requirements["kind"])
    if missing or not device.exist:
        raise UnsupportedError(
            "this machine can't run the library",
            where=path,
            expected=requirements["name"],
            got=f"no {', '.join(missing) or requirements['kind'] + ' device'}",
            todo="export the model for this machine: --device cpu",
        )
    return device


class TvmStepper:
    """Runs one conversation with a library; `reset` fills the states with zeros."""

    def __init__(self, folder: Path, *, exact: bool = False) -> None:
        tvm = require("tvm", "tvm")
        from tvm.runtime.vm import VirtualMachine

        path = folder / LIBRARY
        if not path.is_file():
            raise InputError("there is no library", where=path)
        parameters = open_parameters(folder)
        facts = parameters.facts
        self.context, self._vocab = int(facts["context"]), int(facts["vocab_size"])
        self._chunk = int(facts["chunk"])
        self._device = _find_device(tvm, facts["made_for"], path)
        self._on_cpu = facts["made_for"]["kind"] == "cpu"
        use_all_cores()
        try:
            module = tvm.runtime.load_module(str(path))
            self.machine = VirtualMachine(module, self._device)
            self._load(tvm, parameters)
        except Exception as error:  # the loader of the library may raise any exception
            raise InputError(
                "TVM's runtime can't load the library",
                where=path,
                got=first_line(error),
                todo="the library may be damaged, or from another bundle or another version of TVM",
            ) from error
        suffix = "_exact" if exact and self._on_cpu else ""  # on GPUs every function is exact
        self._decode, self._score = (self.machine[name + suffix] for name in ("decode", "score"))
        self._prefill = self.machine["prefill"]
        self._length = 0

    def _load(self, tvm: Any, parameters: Parameters) -> None:
        """Map the parameters, and check that the library accepts them."""
        facts = parameters.facts
        self._as_tvm = tvm.runtime.from_dlpack
        self._weights = [self._to_device(parameters.tensor(name)) for name in facts["parameters"]]
        shapes = [state["shape"] for state in facts["states"]]
        self._states = [self._zeros(tvm, shape) for shape in shapes]
        dummy = self._to_device(torch.zeros(1, dtype=torch.int32))
        self.machine["check"](dummy, dummy, *self._states, *self._weights)

    def _to_device(self, value: Tensor) -> Any:
        """Return a TVM tensor on the same memory; copy unaligned tensors, and tensors for a GPU."""
        tensor = self._as_tvm(value.clone() if value.data_ptr() % ALIGNMENT else value)
        return tensor if self._on_cpu else tensor.copyto(self._device)

    def _zeros(self, tvm: Any, shape: Sequence[int]) -> Any:
        return tvm.runtime.tensor(np.zeros(shape, np.float32), self._device)

    def reset(self) -> None:
        """Clear the conversation."""
        self._length = 0
        for state in self._states:
            state.copyfrom(np.zeros(state.shape, np.float32))

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[T, V]` of the next tokens of the conversation."""
        pieces = self._ids(tokens).split(self._chunk)
        return torch.cat([self._call(self._score, piece) for piece in pieces])

    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Return float32 logits `[1, V]` of the last of the next tokens."""
        for piece in self._ids(tokens).split(self._chunk):
            logits = self._call(self._prefill, piece)
        return logits

    def _ids(self, tokens: Sequence[int] | Tensor) -> Tensor:
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab)
        return ids.int()

    def _call(self, function: Any, ids: Tensor) -> Tensor:
        if len(ids) == 1:
            function = self._decode
        start = torch.tensor([self._length], dtype=torch.int32)
        inputs = (self._to_device(ids.clone()), self._to_device(start))
        logits = function(*inputs, *self._states, *self._weights)
        self._length += len(ids)
        return torch.from_numpy(logits.numpy())
