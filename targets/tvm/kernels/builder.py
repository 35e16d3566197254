"""Build TIR kernels with Python: the frame of a kernel, vectors, and loops.

A Python loop unrolls. `T.serial` and `T.parallel` of TVM's builder stay loops. Every vector has
`LANES` lanes, whatever the registers of the CPU hold: LLVM splits the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

LANES = 16

Expr = Any  # tirx.PrimExpr: TVM has no types
Buffer = Any
PrimFunc = Any
Shape = Sequence[Any]
Parameter = tuple[str, Shape, str]  # name, shape, dtype


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `start + size` of a tensor `[T, width]`."""

    width: int
    start: int
    size: int


def build(parameters: Sequence[Parameter], body: Callable[..., None]) -> PrimFunc:
    """Build a function of buffers, the last of which are results; `body` takes the buffers and
    emits the code."""
    with IRBuilder() as frame, T.prim_func(s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        handles = [T.arg(name, T.handle()) for name, _, _ in parameters]
        body(
            *(
                T.match_buffer(handle, tuple(shape), dtype)
                for handle, (_, shape, dtype) in zip(handles, parameters, strict=True)
            )
        )
    return frame.get()


def dimension(name: str) -> Expr:
    """Return a size that is known only when the kernel is called."""
    return tirx.Var(name, "int32")


def token_count(tokens: int | None) -> Expr:
    """Return the number of tokens of a call: a constant, or the first dimension of the buffers."""
    return dimension("T") if tokens is None else tokens


def maybe_parallel(count: Expr, tokens: int | None) -> Any:
    """Return a loop over tokens or channels. The loop is parallel unless the call has one token: a
    single token is not worth the cost of waking threads."""
    return T.serial(0, count) if tokens == 1 else T.parallel(0, count)


_SCOPE: ContextVar[str] = ContextVar("scope", default="global")


@contextmanager
def thread_local_buffers() -> Iterator[None]:
    """Allocate local buffers of the code built in this context for one GPU thread."""
    token = _SCOPE.set("local")
    try:
        yield
    finally:
        _SCOPE.reset(token)


_FLOAT16: ContextVar[bool] = ContextVar("halves", default=True)


@contextmanager
def float16_values(supported: bool) -> Iterator[None]:
    """Set whether kernels that are built in this context may have float16 values. OpenCL devices
    may lack float16; a built-in function that every device has then reads float16 buffers as
    float32."""
    token = _FLOAT16.set(supported)
    try:
        yield
    finally:
        _FLOAT16.reset(token)


def alloc_local(size: int, dtype: str = "float32") -> Buffer:
    """Allocate a small array, in registers if its indices are constants. On a CPU the allocation is
    a function call if the array has 1 KiB or more."""
    return T.alloc_buffer((size,), dtype, scope=_SCOPE.get())


def bind(value: Expr) -> Expr:
    """Bind a value that is used more than once to a variable."""
    return T.Bind(value)


def vector(buffer: Buffer, *index: Expr, lanes: int = LANES) -> Expr:
    """Load `lanes` neighbours along the last dimension."""
    indices = (*index[:-1], tirx.Ramp(index[-1], 1, lanes))
    return buffer[indices]


def float_vector(buffer: Buffer, *index: Expr, lanes: int = LANES) -> Expr:
    """Load neighbours along the last dimension, of any dtype, as float32."""
    return cast(vector(buffer, *index, lanes=lanes), "float32")


def prefetch(buffer: Buffer, *index: Expr) -> None:
    """Prefetch the cache line of an element; the element need not exist."""
    address = tirx.address_of(buffer[index])
    # rw = 0: read; locality = 2: moderate; cache type = 1: data
    options = [tirx.const(value, "int32") for value in (0, 2, 1)]
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, *options))


def store(buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Store a scalar, or a vector along the last dimension."""
    lanes = lane_count(value)
    last = tirx.Ramp(index[-1], 1, lanes) if lanes > 1 else index[-1]
    T.buffer_store(buffer, value, [*index[:-1], last])


def lane_count(value: Expr) -> int:
    """Return the number of lanes of a value."""
    _, _, lanes = str(value.ty.dtype).partition("x")
    return int(lanes or 1)


def broadcast(value: Expr, dtype: str | None = None, lanes: int = LANES) -> Expr:
    """Broadcast a scalar to every lane."""
    if isinstance(value, (int, float)):
        value = tirx.const(value, dtype or "float32")
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def cast(value: Expr, dtype: str) -> Expr:
    """Convert a value to a dtype, lane by lane. Without float16 values, OpenCL's `vload_half` reads
    the float16 element."""
    lanes = lane_count(value)
    if str(value.ty.dtype) == "float16" and not _FLOAT16.get():
        assert dtype == "float32"
        return tirx.call_pure_extern(dtype, "vload_half", i32(0), tirx.address_of(value))
    return tirx.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def u32(value: int) -> Expr:
    return tirx.const(value, "uint32")


def i32(value: int) -> Expr:
    return tirx.const(value, "int32")


def const_like(number: float, value: Expr) -> Expr:
    """Return a constant in the dtype and lanes of a value."""
    base, _, lanes = str(value.ty.dtype).partition("x")
    return broadcast(number, base, int(lanes or 1))


def exp(x: Expr) -> Expr:
    """Return e^x, float32, to about 2 units in the last place; never infinite (Cephes' expf)."""
    x = bind(tirx.max(tirx.min(x, const_like(88.0, x)), const_like(-87.0, x)))
    turns = bind(tirx.floor(x * const_like(1.44269504088896341, x) + const_like(0.5, x)))
    rest = bind(x - turns * const_like(0.693359375, x) - turns * const_like(-2.12194440e-4, x))
    series = const_like(1.9875691500e-4, x)
    for factor in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        series = series * rest + const_like(factor, x)
    series = series * rest * rest + rest + const_like(1.0, x)
    exponent = bind(cast(turns, "int32"))
    power = (exponent + const_like(127, exponent)) << const_like(23, exponent)
    return series * tirx.reinterpret(str(x.ty.dtype), power)


def sigmoid(x: Expr) -> Expr:
    return const_like(1.0, x) / (const_like(1.0, x) + exp(const_like(0.0, x) - x))


def sum_lanes(values: Buffer) -> Expr:
    """Return the sum of 16 numbers of a local array."""
    return reduce_lanes(lambda a, b: a + b, values)


def max_lanes(values: Buffer, start: int = 0) -> Expr:
    """Return the maximum of 16 numbers of a local array."""
    return reduce_lanes(tirx.max, values, start)


def reduce_lanes(join: Callable[[Expr, Expr], Expr], values: Buffer, start: int = 0) -> Expr:
    """Reduce 16 numbers of a local array to one by a tree of `join`."""
    parts = [values[start + lane] for lane in range(LANES)]
    while len(parts) > 1:
        parts = [join(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
