"""Blocks of threads: what kernels for GPUs are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import Buffer, Expr, bind, on_a_thread, put

THREADS = 256


@contextmanager
def blocks(*counts: Expr, threads: int = THREADS) -> Iterator[list[Expr]]:
    """A grid of up to two dims; gives a block's place in it, and the thread."""
    with ExitStack() as stack:
        places = [
            stack.enter_context(T.thread_binding(0, count, f"blockIdx.{axis}"))
            for count, axis in zip(counts, "xy", strict=False)
        ]
        thread = stack.enter_context(T.thread_binding(0, threads, "threadIdx.x"))
        stack.enter_context(on_a_thread())
        yield [*places, thread]


def each(count: Expr, body: Callable[[Expr], None]) -> None:
    """A thread for everything that there is to do."""
    with blocks(divided(count, THREADS)) as (block, thread):
        at = bind(block * THREADS + thread)
        with T.If(at < count), T.Then():
            body(at)


def strided(
    count: Expr, thread: Expr, body: Callable[[Expr], None], threads: int = THREADS
) -> None:
    """Share out what a block has to do among its threads."""
    with T.serial(0, divided(count, threads)) as step:
        at = bind(step * threads + thread)
        with T.If(at < count), T.Then():
            body(at)


def divided(count: Expr, by: int) -> Expr:
    """Rounded up."""
    return tirx.floordiv(count + (by - 1), by)


def shared(size: int) -> Buffer:
    """Float32 that all threads of a block see."""
    return T.alloc_buffer((size,), "float32", scope="shared")


def sync() -> None:
    """Wait for all threads of a block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def reduce(
    held: Buffer, thread: Expr, value: Expr, join: Callable[[Expr, Expr], Expr], threads: int
) -> Expr:
    """One value of all threads' values, by way of `held`."""
    put(held, value, thread)
    sync()
    size = threads // 2
    while size:
        with T.If(thread < size), T.Then():
            put(held, join(held[thread], held[thread + size]), thread)
        sync()
        size //= 2
    found = bind(held[0])
    sync()
    return found


def add(a: Expr, b: Expr) -> Expr:
    return a + b
