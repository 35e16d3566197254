"""Grouped-query attention over a KV cache, with the cache layout of the CPU kernels."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lfmc.targets.tvm.kernels.attention import (
    MASKED,
    SLOTS,
    Heads,
    attend_parameters,
    write_heads_parameters,
)
from lfmc.targets.tvm.kernels.builder import (
    Buffer,
    Columns,
    Expr,
    PrimFunc,
    alloc_local,
    bind,
    build,
    cast,
    exp,
    store,
    token_count,
)
from lfmc.targets.tvm.kernels.gpu.grid import (
    add,
    alloc_shared,
    for_each,
    reduce,
    strided_loop,
    sync,
    thread_blocks,
)


def write_heads(
    heads: Heads,
    parts: tuple[Columns, Columns, Columns],
    dtypes: tuple[str, str],
    eps: float,
    tokens: int | None,
) -> PrimFunc:
    """Normalize and rotate heads, and write the cache: one thread per head."""
    count = token_count(tokens)
    query_heads, key_heads, dim = heads.queries, heads.keys, heads.dim
    parameters = write_heads_parameters(heads, parts, dtypes, count)
    starts = [part.start for part in parts]

    def body(
        q: Buffer,
        k: Buffer,
        v: Buffer,
        start: Buffer,
        q_norm: Buffer,
        k_norm: Buffer,
        cos: Buffer,
        sin: Buffer,
        keys: Buffer,
        values: Buffer,
        y: Buffer,
    ) -> None:
        def rotate(x: Buffer, token: Expr, first: Expr, norm: Buffer) -> Buffer:
            squares, result = alloc_local(1), alloc_local(dim)
            store(squares, tirx.const(0.0, "float32"), 0)
            for column in range(dim):
                value = bind(x[token, first + column])
                store(squares, squares[0] + value * value, 0)
            mean = squares[0] / tirx.const(float(dim), "float32")
            root = tirx.sqrt(mean + tirx.const(eps, "float32"))
            factor = bind(tirx.const(1.0, "float32") / root)
            half = dim // 2
            for column in range(half):
                low = bind(x[token, first + column] * factor * cast(norm[column], "float32"))
                high = bind(
                    x[token, first + half + column] * factor * cast(norm[half + column], "float32")
                )
                store(result, low * cos[token, column] - high * sin[token, column], column)
                store(result, high * cos[token, column] + low * sin[token, column], half + column)
            return result

        def process_head(index: Expr) -> None:
            token = bind(tirx.floordiv(index, query_heads + key_heads))
            head = bind(tirx.floormod(index, query_heads + key_heads))
            position = bind(start[0] + token)
            with T.If(head < query_heads):
                with T.Then():
                    rotated = rotate(q, token, starts[0] + head * dim, q_norm)
                    for column in range(dim):
                        store(y, rotated[column], token, head * dim + column)
                with T.Else():
                    key_head = bind(head - query_heads)
                    rotated = rotate(k, token, starts[1] + key_head * dim, k_norm)
                    block, slot = tirx.floordiv(position, SLOTS), tirx.floormod(position, SLOTS)
                    for column in range(dim):
                        store(keys, rotated[column], key_head, block, column, slot)
                        value = v[token, starts[2] + key_head * dim + column]
                        store(values, value, key_head, position, column)

        for_each(count * (query_heads + key_heads), process_head)

    return build(parameters, body)


def attend(heads: Heads, window: int, tokens: int | None) -> PrimFunc:
    """Attend with a block for each pair of token and query head. Each thread takes every n-th
    position (n: threads of the block) and keeps a weighted sum, the sum of weights, and the highest
    score; then the block combines the sums of its threads."""
    count, dim = token_count(tokens), heads.dim
    threads = 128 if dim <= 64 else 64  # so that the sums of all threads fit in shared memory
    parameters = attend_parameters(heads, count)

    def body(q: Buffer, start: Buffer, keys: Buffer, values: Buffer, y: Buffer) -> None:
        with thread_blocks(count, heads.queries, threads=threads) as (token, head, thread):
            key_head = bind(tirx.floordiv(head, heads.queries_per_key))
            scratch = alloc_shared(threads)
            sums, all_sums = alloc_local(dim + 2), alloc_shared(threads * (dim + 1))
            max_index, weight_index = dim, dim + 1
            for index in range(dim):
                store(sums, tirx.const(0.0, "float32"), index)
            store(sums, tirx.const(MASKED, "float32"), max_index)
            store(sums, tirx.const(0.0, "float32"), weight_index)
            end = bind(start[0] + token + 1)
            first = bind(tirx.max(end - window, 0) if window else tirx.const(0, "int32"))

            def accumulate(index: Expr) -> None:
                position = bind(first + index)
                block, slot = tirx.floordiv(position, SLOTS), tirx.floormod(position, SLOTS)
                score = alloc_local(1)
                store(score, tirx.const(0.0, "float32"), 0)
                for column in range(dim):
                    part = q[token, head * dim + column] * keys[key_head, block, column, slot]
                    store(score, score[0] + part, 0)
                scaled = bind(score[0] * tirx.const(dim**-0.5, "float32"))
                new_maximum = bind(tirx.max(sums[max_index], scaled))
                old_factor = bind(exp(sums[max_index] - new_maximum))
                new_factor = bind(exp(scaled - new_maximum))
                store(sums, sums[weight_index] * old_factor + new_factor, weight_index)
                for column in range(dim):
                    value = (
                        sums[column] * old_factor + new_factor * values[key_head, position, column]
                    )
                    store(sums, value, column)
                store(sums, new_maximum, max_index)

            strided_loop(end - first, thread, accumulate, threads)
            maximum = reduce(scratch, thread, sums[max_index], tirx.max, threads)
            factor = bind(exp(sums[max_index] - maximum))
            total_weight = reduce(scratch, thread, sums[weight_index] * factor, add, threads)
            for index in range(dim):
                store(all_sums, sums[index] * factor, thread * (dim + 1) + index)
            sync()

            def write(column: Expr) -> None:
                total = alloc_local(1)
                store(total, tirx.const(0.0, "float32"), 0)
                with T.serial(0, threads) as source:
                    store(total, total[0] + all_sums[source * (dim + 1) + column], 0)
                store(y, total[0] / total_weight, token, head * dim + column)

            strided_loop(dim, thread, write, threads)

    return build(parameters, body)
