"""Run a library's OpenCL code on PoCL, an OpenCL driver for CPUs; TVM's wheel has no OpenCL
runtime.

TVM's virtual machine runs the unchanged library. This module adds to TVM's registries what the
wheel lacks: a device whose memory is the CPU's memory (PoCL accepts CPU pointers), a loader of the
OpenCL code in the library, and the kernels, which pyopencl builds from the code and launches.

`python -m tests.targets.tvm.pocl BUNDLE --serve` speaks the protocol of the C++ runners. It runs in
a process of its own, because registrations and devices can't be removed.
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
import tvm.runtime  # noqa: F401 (registers the CPU's device)
import tvm_ffi

from lfmc.targets.tvm.runtime import TvmStepper

AXES = "xyz"
POINTER = 3  # DLPack's type code of a handle
NUMBERS = {(0, 32): np.int32, (0, 64): np.int64, (2, 32): np.float32}


@dataclass(frozen=True)
class Entry:
    """A kernel: the dtypes of its arguments as (code, bits), and the meaning of the launch sizes
    after the arguments."""

    name: str
    types: Sequence[tuple[int, int]]
    launch: Sequence[str]


def parse(blob: bytes) -> tuple[list[Entry], str]:
    """Parse TVM's serialized OpenCL module; return the kernels and their source."""
    offset = 0

    def number(format: str = "Q") -> int:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{format}", blob, offset)
        offset += struct.calcsize(format)
        return int(value)

    def text() -> str:
        nonlocal offset
        size = number()
        offset += size
        return blob[offset - size : offset].decode()

    def dtype() -> tuple[int, int]:
        code, bits, lanes = number("B"), number("B"), number("H")
        assert lanes == 1
        return code, bits

    def entry() -> Entry:
        name, function_name = text(), text()
        assert name == function_name
        types = [dtype() for _ in range(number())]
        launch = [text() for _ in range(number())]
        assert not any(number("i") for _ in range(number()))  # no argument has a special type
        return Entry(name, types, launch)

    assert text() == "cl"
    entries = [entry() for _ in range(number())]
    source = text()
    assert offset == len(blob)
    return entries, source


class Driver:
    """Builds and launches kernels with pyopencl."""

    def __init__(self) -> None:
        import pyopencl

        self._cl = pyopencl
        self._context = pyopencl.Context([pocl_device()])
        self._queue = pyopencl.CommandQueue(self._context)

    def load(self, blob: bytes) -> Any:
        """Build the code of a library, register its kernels where the functions of the library look
        them up, and return a module without functions for TVM."""
        entries, source = parse(blob)
        program = self._cl.Program(self._context, source).build()
        for entry in entries:
            kernel = getattr(program, entry.name)
            tvm_ffi.register_global_func(
                entry.name, self._make_launcher(kernel, entry), override=True
            )
        return tvm_ffi.get_global_func("runtime.CSourceModuleCreate")("", "c", [], [])

    def _make_launcher(self, kernel: Any, entry: Entry) -> Any:
        count = len(entry.types)

        def launch(*args: Any) -> None:
            for index, (value, dtype) in enumerate(zip(args[:count], entry.types, strict=True)):
                kernel.set_arg(index, self._argument(value, dtype))
            sizes = dict(zip(entry.launch, args[count:], strict=True))
            local_size = [sizes.pop(f"threadIdx.{axis}", 1) for axis in AXES]
            grid = [sizes.pop(f"blockIdx.{axis}", 1) for axis in AXES]
            global_size = [
                threads * block_count for threads, block_count in zip(local_size, grid, strict=True)
            ]
            assert not sizes
            self._cl.enqueue_nd_range_kernel(self._queue, kernel, global_size, local_size)
            self._queue.finish()

        return launch

    def _argument(self, value: Any, dtype: tuple[int, int]) -> Any:
        if dtype[0] != POINTER:
            return NUMBERS[dtype](value)
        memory = (ctypes.c_char * 1).from_address(value.value)
        return self._cl.SVM(np.frombuffer(memory, np.uint8))


def pocl_device() -> Any:
    """Return the CPU as PoCL's device, or None if PoCL is not installed."""
    import pyopencl

    try:
        platforms = pyopencl.get_platforms()
    except pyopencl.LogicError:  # no OpenCL platform is installed
        return None
    matches = [platform for platform in platforms if platform.name == "Portable Computing Language"]
    return matches[0].get_devices()[0] if matches else None


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
