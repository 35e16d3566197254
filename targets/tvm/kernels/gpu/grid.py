"""Blocks of threads, from which GPU kernels are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.builder import Buffer, Expr, bind, store, thread_local_buffers

THREADS = 256


@contextmanager
def thread_blocks(*counts: Expr, threads: int = THREADS) -> Iterator[list[Expr]]:
    """Open a grid of up to two dimensions; yield the indices of the block, and the thread."""
    with ExitStack() as stack:
        indices = [
            stack.enter_context(T.thread_binding(0, count, f"blockIdx.{axis}"))
            for count, axis in zip(counts, "xy", strict=False)
        ]
        thread = stack.enter_context(T.thread_binding(0, threads, "threadIdx.x"))
        stack.enter_context(thread_local_buffers())
        yield [*indices, thread]


def for_each(count: Expr, body: Callable[[Expr], None]) -> None:
    """Run `body` for each index below `count`, each on a thread of its own."""
    with thread_blocks(ceildiv(count, THREADS)) as (block, thread):
        index = bind(block * THREADS + thread)
        with T.If(index < count), T.Then():
            body(index)


def strided_loop(
    count: Expr, thread: Expr, body: Callable[[Expr], None], threads: int = THREADS
) -> None:
    """Distribute `count` iterations among the threads of a block."""
    with T.serial(0, ceildiv(count, threads)) as step:
        index = bind(step * threads + thread)
        with T.If(index < count), T.Then():
            body(index)


def ceildiv(count: Expr, divisor: int) -> Expr:
    """Divide, and round up."""
    return tirx.floordiv(count + (divisor - 1), divisor)


def alloc_shared(size: int) -> Buffer:
    """Allocate float32 memory that all threads of a block share."""
    return T.alloc_buffer((size,), "float32", scope="shared")


def sync() -> None:
    """Wait for all threads of a block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def reduce(
    scratch: Buffer, thread: Expr, value: Expr, combine: Callable[[Expr, Expr], Expr], threads: int
) -> Expr:
    """Reduce the values of all threads to one, in shared memory `scratch`."""
    store(scratch, value, thread)
    sync()
    size = threads // 2
    while size:
        with T.If(thread < size), T.Then():
            store(scratch, combine(scratch[thread], scratch[thread + size]), thread)
        sync()
        size //= 2
    result = bind(scratch[0])
    sync()
    return result


def add(a: Expr, b: Expr) -> Expr:
    return a + b
