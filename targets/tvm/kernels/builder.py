"""Writing TIR with Python: a kernel's frame, vectors, and loops.

A Python loop unrolls, `T.serial` and `T.parallel` of TVM's builder stay loops. All vectors have
`LANES` lanes, whatever the CPU's registers hold: LLVM splits them.
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
    """Columns `start` to `start + size` of a value `[T, width]`."""

    width: int
    start: int
    size: int


def build(parameters: Sequence[Parameter], body: Callable[..., None]) -> PrimFunc:
    """A function of buffers, the last of which are results; `body` gets them and writes it."""
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
    """A size that is known when the kernel is called."""
    return tirx.Var(name, "int32")


def tokens_of(tokens: int | None) -> Expr:
    """How many tokens a call has: a number, or as many as its buffers have."""
    return dimension("T") if tokens is None else tokens


def side_by_side(count: Expr, tokens: int | None) -> Any:
    """A loop over tokens or channels, side by side where there may be many tokens: for one alone it
    is not worth waking threads."""
    return T.serial(0, count) if tokens == 1 else T.parallel(0, count)


_SCOPE: ContextVar[str] = ContextVar("scope", default="global")


@contextmanager
def on_a_thread() -> Iterator[None]:
    """What is written meanwhile is for one of a GPU's threads, with memory of its own."""
    before = _SCOPE.set("local")
    try:
        yield
    finally:
        _SCOPE.reset(before)


_HALVES: ContextVar[bool] = ContextVar("halves", default=True)


@contextmanager
def halves(are_there: bool) -> Iterator[None]:
    """Whether kernels that are made meanwhile may have values of float16. OpenCL's devices may lack
    them; what kernels read becomes float32 by a function that all have."""
    before = _HALVES.set(are_there)
    try:
        yield
    finally:
        _HALVES.reset(before)


def local(size: int, dtype: str = "float32") -> Buffer:
    """A small array, in registers where its indices are numbers. On a CPU it takes a call where it
    has 1 KiB or more."""
    return T.alloc_buffer((size,), dtype, scope=_SCOPE.get())


def bind(value: Expr) -> Expr:
    """A name for a value that is used more than once."""
    return T.Bind(value)


def vector(buffer: Buffer, *index: Expr, lanes: int = LANES) -> Expr:
    """`lanes` neighbours along the last dim."""
    place = (*index[:-1], tirx.Ramp(index[-1], 1, lanes))
    return buffer[place]


def floats(buffer: Buffer, *index: Expr, lanes: int = LANES) -> Expr:
    """Neighbours along the last dim, of whatever dtype, as float32."""
    return cast(vector(buffer, *index, lanes=lanes), "float32")


def prefetch(buffer: Buffer, *index: Expr) -> None:
    """Have the cache line of an element read before it is needed; it need not exist."""
    address = tirx.address_of(buffer[index])
    numbers = [tirx.const(value, "int32") for value in (0, 2, 1)]  # to read, to keep a while, data
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, *numbers))


def put(buffer: Buffer, value: Expr, *index: Expr) -> None:
    """Store a scalar, or a vector along the last dim."""
    lanes = lanes_of(value)
    last = tirx.Ramp(index[-1], 1, lanes) if lanes > 1 else index[-1]
    T.buffer_store(buffer, value, [*index[:-1], last])


def lanes_of(value: Expr) -> int:
    _, _, lanes = str(value.ty.dtype).partition("x")
    return int(lanes or 1)


def wide(value: Expr, dtype: str | None = None, lanes: int = LANES) -> Expr:
    """A scalar in every lane."""
    if isinstance(value, (int, float)):
        value = tirx.const(value, dtype or "float32")
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def cast(value: Expr, dtype: str) -> Expr:
    """The value itself, where it has the dtype already."""
    lanes = lanes_of(value)
    if str(value.ty.dtype) == "float16" and not _HALVES.get():
        assert dtype == "float32"
        return tirx.call_pure_extern(dtype, "vload_half", i32(0), tirx.address_of(value))
    return tirx.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)


def u32(value: int) -> Expr:
    return tirx.const(value, "uint32")


def i32(value: int) -> Expr:
    return tirx.const(value, "int32")


def like(number: float, value: Expr) -> Expr:
    """A number in the dtype and lanes of a value."""
    base, _, lanes = str(value.ty.dtype).partition("x")
    return wide(number, base, int(lanes or 1))


def exp(x: Expr) -> Expr:
    """e^x, float32, to about 2 units in the last place; never infinite (Cephes' expf)."""
    x = bind(tirx.max(tirx.min(x, like(88.0, x)), like(-87.0, x)))
    turns = bind(tirx.floor(x * like(1.44269504088896341, x) + like(0.5, x)))
    rest = bind(x - turns * like(0.693359375, x) - turns * like(-2.12194440e-4, x))
    series = like(1.9875691500e-4, x)
    for factor in (
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    ):
        series = series * rest + like(factor, x)
    series = series * rest * rest + rest + like(1.0, x)
    whole = bind(cast(turns, "int32"))
    power = (whole + like(127, whole)) << like(23, whole)
    return series * tirx.reinterpret(str(x.ty.dtype), power)


def sigmoid(x: Expr) -> Expr:
    return like(1.0, x) / (like(1.0, x) + exp(like(0.0, x) - x))


def total(values: Buffer) -> Expr:
    """The sum of 16 numbers of a local array."""
    return pairwise(lambda a, b: a + b, values)


def highest(values: Buffer, start: int = 0) -> Expr:
    """The greatest of 16 numbers of a local array."""
    return pairwise(tirx.max, values, start)


def pairwise(join: Callable[[Expr, Expr], Expr], values: Buffer, start: int = 0) -> Expr:
    """One value of 16 of a local array."""
    parts = [values[start + lane] for lane in range(LANES)]
    while len(parts) > 1:
        parts = [join(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
