"""A library's OpenCL code on PoCL, an OpenCL driver of the CPU; TVM's wheel has no OpenCL runtime.

The library runs as it is, by TVM's virtual machine. What the wheel lacks is given to its
registries: a device whose memory is the CPU's (PoCL takes its pointers as they are), a loader of
the OpenCL code inside the library, and its kernels, which pyopencl makes of that code and starts.

`python -m tests.targets.tvm.pocl BUNDLE --serve` answers what the C++ runners answer; a process of
its own, as registries and devices can't be taken back.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm.runtime  # noqa: F401 (it registers the CPU's device)
import tvm_ffi

from lfmc.targets.tvm.runtime import TvmStepper

AXES = "xyz"
POINTER = 3  # DLPack's code of a handle
NUMBERS = {(0, 32): np.int32, (0, 64): np.int64, (2, 32): np.float32}


@dataclass(frozen=True)
class Entry:
    """A kernel: its arguments' dtypes as (code, bits), and what the numbers behind them say."""

    name: str
    types: Sequence[tuple[int, int]]
    launch: Sequence[str]


def parse(blob: bytes) -> tuple[list[Entry], str]:
    """What TVM writes of an OpenCL module: the kernels and their source."""
    at = 0

    def number(form: str = "Q") -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", blob, at)
        at += struct.calcsize(form)
        return int(value)

    def text() -> str:
        nonlocal at
        size = number()
        at += size
        return blob[at - size : at].decode()

    def dtype() -> tuple[int, int]:
        code, bits, lanes = number("B"), number("B"), number("H")
        assert lanes == 1
        return code, bits

    def entry() -> Entry:
        name, again = text(), text()
        assert name == again
        types = [dtype() for _ in range(number())]
        launch = [text() for _ in range(number())]
        assert not any(number("i") for _ in range(number()))  # no argument is something special
        return Entry(name, types, launch)

    assert text() == "cl"
    entries = [entry() for _ in range(number())]
    source = text()
    assert at == len(blob)
    return entries, source


class Driver:
    """Kernels by pyopencl."""

    def __init__(self) -> None:
        import pyopencl

        self._cl = pyopencl
        self._context = pyopencl.Context([pocl_device()])
        self._queue = pyopencl.CommandQueue(self._context)

    def load(self, blob: bytes) -> Any:
        """Build a library's code, put its kernels where the library's functions look for them, and
        give TVM a module without functions instead."""
        entries, source = parse(blob)
        program = self._cl.Program(self._context, source).build()
        for entry in entries:
            kernel = getattr(program, entry.name)
            tvm_ffi.register_global_func(entry.name, self._starter(kernel, entry), override=True)
        return tvm_ffi.get_global_func("runtime.CSourceModuleCreate")("", "c", [], [])

    def _starter(self, kernel: Any, entry: Entry) -> Any:
        count = len(entry.types)

        def start(*args: Any) -> None:
            for index, (value, kind) in enumerate(zip(args[:count], entry.types, strict=True)):
                kernel.set_arg(index, self._argument(value, kind))
            told = dict(zip(entry.launch, args[count:], strict=True))
            local = [told.pop(f"threadIdx.{axis}", 1) for axis in AXES]
            blocks = [told.pop(f"blockIdx.{axis}", 1) for axis in AXES]
            whole = [each * many for each, many in zip(local, blocks, strict=True)]
            assert not told
            self._cl.enqueue_nd_range_kernel(self._queue, kernel, whole, local)
            self._queue.finish()

        return start

    def _argument(self, value: Any, kind: tuple[int, int]) -> Any:
        if kind[0] != POINTER:
            return NUMBERS[kind](value)
        memory = (ctypes.c_char * 1).from_address(value.value)
        return self._cl.SVM(np.frombuffer(memory, np.uint8))


def pocl_device() -> Any:
    """The CPU as PoCL's device, or None where PoCL is not on this machine."""
    import pyopencl

    try:
        platforms = pyopencl.get_platforms()
    except pyopencl.LogicError:  # there is no platform at all
        return None
    found = [p for p in platforms if p.name == "Portable Computing Language"]
    return found[0].get_devices()[0] if found else None


def serve(bundle: Path) -> None:
    driver, cpu = Driver(), tvm_ffi.get_global_func("device_api.cpu")
    tvm_ffi.register_global_func("device_api.opencl", lambda: cpu())
    tvm_ffi.register_global_func("ffi.Module.load_from_bytes.opencl", driver.load)
    stepper = TvmStepper(bundle)
    for line in sys.stdin:
        request, *ids = line.split()
        if request == "reset":
            stepper.reset()
            data = b""
        else:
            data = stepper.step([int(token) for token in ids]).numpy().tobytes()
        sys.stdout.buffer.write(f"{len(data) // 4}\n".encode() + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
