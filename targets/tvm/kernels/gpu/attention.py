"""Grouped-query attention over a cache, laid out as for CPUs."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.attention import (
    FAR,
    SLOTS,
    Heads,
    attend_parameters,
    heads_parameters,
)
from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Columns,
    Expr,
    PrimFunc,
    bind,
    build,
    cast,
    exp,
    local,
    put,
    tokens_of,
)
from lfmc.targets.tvm.kernels.gpu.grid import (
    add,
    blocks,
    each,
    reduce,
    shared,
    strided,
    sync,
)


def write_heads(
    heads: Heads,
    parts: tuple[Columns, Columns, Columns],
    dtypes: tuple[str, str],
    eps: float,
    tokens: int | None,
) -> PrimFunc:
    """A thread a head."""
    count = tokens_of(tokens)
    q, k, dim = heads.queries, heads.keys, heads.dim
    parameters = heads_parameters(heads, parts, dtypes, count)
    starts = [part.start for part in parts]

    def body(
        given_q: Buffer,
        given_k: Buffer,
        given_v: Buffer,
        start: Buffer,
        q_norm: Buffer,
        k_norm: Buffer,
        cos: Buffer,
        sin: Buffer,
        keys: Buffer,
        values: Buffer,
        y: Buffer,
    ) -> None:
        def turned(x: Buffer, token: Expr, first: Expr, norm: Buffer) -> Buffer:
            squares, found = local(1), local(dim)
            put(squares, tirx.const(0.0, "float32"), 0)
            for at in range(dim):
                value = bind(x[token, first + at])
                put(squares, squares[0] + value * value, 0)
            mean = squares[0] / tirx.const(float(dim), "float32")
            root = tirx.sqrt(mean + tirx.const(eps, "float32"))
            factor = bind(tirx.const(1.0, "float32") / root)
            half = dim // 2
            for at in range(half):
                low = bind(x[token, first + at] * factor * cast(norm[at], "float32"))
                high = bind(x[token, first + half + at] * factor * cast(norm[half + at], "float32"))
                put(found, low * cos[token, at] - high * sin[token, at], at)
                put(found, high * cos[token, at] + low * sin[token, at], half + at)
            return found

        def one(at: Expr) -> None:
            token, head = bind(tirx.floordiv(at, q + k)), bind(tirx.floormod(at, q + k))
            position = bind(start[0] + token)
            with T.If(head < q):
                with T.Then():
                    found = turned(given_q, token, starts[0] + head * dim, q_norm)
                    for index in range(dim):
                        put(y, found[index], token, head * dim + index)
                with T.Else():
                    own = bind(head - q)
                    found = turned(given_k, token, starts[1] + own * dim, k_norm)
                    block, slot = tirx.floordiv(position, SLOTS), tirx.floormod(position, SLOTS)
                    for index in range(dim):
                        put(keys, found[index], own, block, index, slot)
                        value = given_v[token, starts[2] + own * dim + index]
                        put(values, value, own, position, index)

        each(count * (q + k), one)

    return build(parameters, body)


def attend(heads: Heads, window: int, tokens: int | None) -> PrimFunc:
    """A block for each token and query head: a thread takes every so manyth position, and keeps a
    sum, its weight and the highest score; then they are brought together."""
    count, dim = tokens_of(tokens), heads.dim
    threads = 128 if dim <= 64 else 64  # so that sums of all fit the memory that they share
    parameters = attend_parameters(heads, count)

    def body(q: Buffer, start: Buffer, keys: Buffer, values: Buffer, y: Buffer) -> None:
        with blocks(count, heads.queries, threads=threads) as (token, head, thread):
            own, held = bind(tirx.floordiv(head, heads.each)), shared(threads)
            sums, all_sums = local(dim + 2), shared(threads * (dim + 1))
            most, weight = dim, dim + 1
            for index in range(dim):
                put(sums, tirx.const(0.0, "float32"), index)
            put(sums, tirx.const(FAR, "float32"), most)
            put(sums, tirx.const(0.0, "float32"), weight)
            end = bind(start[0] + token + 1)
            low = bind(tirx.max(end - window, 0) if window else tirx.const(0, "int32"))

            def see(at: Expr) -> None:
                position = bind(low + at)
                block, slot = tirx.floordiv(position, SLOTS), tirx.floormod(position, SLOTS)
                score = local(1)
                put(score, tirx.const(0.0, "float32"), 0)
                for index in range(dim):
                    part = q[token, head * dim + index] * keys[own, block, index, slot]
                    put(score, score[0] + part, 0)
                scaled = bind(score[0] * tirx.const(dim**-0.5, "float32"))
                higher = bind(tirx.max(sums[most], scaled))
                kept, new = bind(exp(sums[most] - higher)), bind(exp(scaled - higher))
                put(sums, sums[weight] * kept + new, weight)
                for index in range(dim):
                    value = sums[index] * kept + new * values[own, position, index]
                    put(sums, value, index)
                put(sums, higher, most)

            strided(end - low, thread, see, threads)
            highest = reduce(held, thread, sums[most], tirx.max, threads)
            factor = bind(exp(sums[most] - highest))
            whole = reduce(held, thread, sums[weight] * factor, add, threads)
            for index in range(dim):
                put(all_sums, sums[index] * factor, thread * (dim + 1) + index)
            sync()

            def write(column: Expr) -> None:
                total = local(1)
                put(total, tirx.const(0.0, "float32"), 0)
                with T.serial(0, threads) as other:
                    put(total, total[0] + all_sums[other * (dim + 1) + column], 0)
                put(y, total[0] / whole, token, head * dim + column)

            strided(dim, thread, write, threads)

    return build(parameters, body)
