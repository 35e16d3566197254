"""Running a library by TVM's runtime, the way an app does."""

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
    """Have TVM run as many threads as there are cores, unless the user said how many.

    By itself it takes half of an x86 machine's CPUs, as if each were half of a core, and ties the
    thread that calls it to one of them: whatever that thread starts later would share it. It looks
    at these variables once, when it first runs something in parallel.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ.setdefault("TVM_NUM_THREADS", str(cores()))
    os.environ.setdefault("TVM_BIND_THREADS", "0")


def cores() -> int:
    """Cores that this process may use, each counted once however many threads it runs."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    allowed = os.sched_getaffinity(0)
    paths = [Path(topology.format(cpu)) for cpu in allowed]
    if not all(path.is_file() for path in paths):
        return len(allowed)
    return len({path.read_text() for path in paths})


def _device(tvm: Any, wanted: Mapping[str, Any], path: Path) -> Any:
    """TVM's device for a library; raises `UnsupportedError` where this machine has none."""
    lacks = sorted(set(wanted.get("needs", ())) - machine_flags())
    device = tvm.device(wanted["kind"])
    if lacks or not device.exist:
        raise UnsupportedError(
            "this machine can't run the library",
            where=path,
            expected=wanted["name"],
            got=f"no {', '.join(lacks) or wanted['kind'] + ' device'}",
            todo="export it for this machine: --device cpu",
        )
    return device


class TvmStepper:
    """One conversation with a library; `reset` fills the states with zeros."""

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
        self._device = _device(tvm, facts["made_for"], path)
        self._on_cpu = facts["made_for"]["kind"] == "cpu"
        use_all_cores()
        try:
            module = tvm.runtime.load_module(str(path))
            self.machine = VirtualMachine(module, self._device)
            self._load(tvm, parameters)
        except Exception as error:  # the library raises whatever its loader raises
            raise InputError(
                "TVM's runtime can't load the library",
                where=path,
                got=first_line(error),
                todo="it may be damaged, of another bundle, or of another version of TVM",
            ) from error
        end = "_exact" if exact and self._on_cpu else ""  # GPUs always are
        self._decode, self._score = (self.machine[name + end] for name in ("decode", "score"))
        self._prefill = self.machine["prefill"]
        self._length = 0

    def _load(self, tvm: Any, parameters: Parameters) -> None:
        """Map the parameters, and see whether the library takes them."""
        facts = parameters.facts
        self._as_tvm = tvm.runtime.from_dlpack
        self._weights = [self._given(parameters.tensor(n)) for n in facts["parameters"]]
        shapes = [state["shape"] for state in facts["states"]]
        self._states = [self._zeros(tvm, shape) for shape in shapes]
        one = self._given(torch.zeros(1, dtype=torch.int32))
        self.machine["check"](one, one, *self._states, *self._weights)

    def _given(self, value: Tensor) -> Any:
        """A tensor of TVM on the same memory, but for what is not aligned, or goes to a GPU."""
        own = self._as_tvm(value.clone() if value.data_ptr() % ALIGNMENT else value)
        return own if self._on_cpu else own.copyto(self._device)

    def _zeros(self, tvm: Any, shape: Sequence[int]) -> Any:
        return tvm.runtime.tensor(np.zeros(shape, np.float32), self._device)

    def reset(self) -> None:
        """Forget the conversation."""
        self._length = 0
        for state in self._states:
            state.copyfrom(np.zeros(state.shape, np.float32))

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits `[T, V]` of the tokens that come next."""
        pieces = self._ids(tokens).split(self._chunk)
        return torch.cat([self._call(self._score, piece) for piece in pieces])

    def prefill(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits `[1, V]` of the last of the tokens that come next."""
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
        given = (self._given(ids.clone()), self._given(start))
        logits = function(*given, *self._states, *self._weights)
        self._length += len(ids)
        return torch.from_numpy(logits.numpy())
