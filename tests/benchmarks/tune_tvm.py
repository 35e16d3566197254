"""Benchmark the TVM target's matrix products: memory bandwidth, prefetch distance and tile size.

`python tests/benchmarks/tune_tvm.py [--cpu avx2]` times products of one token (GEMV) at each width
and compares them with reading the same bytes. It also times them at each prefetch distance of codes
(`ahead` of `lfmc.targets.tvm.kernels.cpus`), and products of 128 tokens at each number of tokens in
a tile (`tile`). Matrices have the shapes of LFM2-350M. Each run reads several matrices in turn, so
that none stays in a core's cache. Candidates alternate; the output is the best and median round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import tvm

from lfmc.calib_free.grid.formats import Format
from lfmc.targets.tvm.compile import tvm_target
from lfmc.targets.tvm.kernels.cpus import CPUS, Cpu, this_cpu
from lfmc.targets.tvm.kernels.linear import linear
from lfmc.targets.tvm.runtime import cores, use_all_cores

ROWS, COLUMNS, COPIES = 9216, 1024, 16
TILES = (1, 2, 4, 6, 8, 12, 16)
AHEAD = (0, 512, 1024, 2048, 4096, 8192)
BITS = (2, 3, 4, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", choices=CPUS, help="a CPU family instead of this machine's")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cpu = CPUS[options.cpu] if options.cpu else this_cpu()
    use_all_cores()
    torch.set_num_threads(cores())
    print(f"{cpu.name}, {cores()} threads, {COPIES} matrices {ROWS} x {COLUMNS}\n")
    gemv(cpu, options.rounds)
    gemm(cpu, options.tokens, options.rounds)


def gemv(cpu: Cpu, rounds: int) -> None:
    """Print the bandwidth of products of one token, by format and by prefetch distance."""
    runs: dict[Any, Callable[[], None]] = {}
    nbytes = {}
    for format in (Format(b, g, s, "float16") for b in BITS for g, s in ((32, False), (128, True))):
        runs[format], nbytes[format] = _product(format, cpu, 1)
    for format in list(runs):
        buffer = torch.ones(COPIES * nbytes[format] // 8, dtype=torch.int64)
        runs["read", format] = lambda buffer=buffer: buffer.sum()
        nbytes["read", format] = nbytes[format]
    times = _time_rounds(runs, rounds)
    print("| one token | GB/s, best (median) | share of torch's speed of reading as many bytes |")
    print("|---|---|---|")
    for format in runs:
        if isinstance(format, Format):
            seconds, read_seconds = times[format], times["read", format]
            size, median = COPIES * nbytes[format] / 1e9, statistics.median(seconds)
            share = statistics.median(read_seconds) / median
            speed = f"{size / min(seconds):.1f} ({size / median:.1f})"
            print(f"| {format.name} | {speed} | {share:.0%} |")
    print()
    format = Format(4, 32, False, "float16")
    products = {ahead: _product(format, replace(cpu, ahead=ahead), 1) for ahead in AHEAD}
    times = _time_rounds({ahead: run for ahead, (run, _) in products.items()}, rounds)
    print("| bytes ahead | 4 bits, groups of 32: GB/s, best (median) |")
    print("|---|---|")
    for ahead, seconds in times.items():
        size, median = COPIES * products[ahead][1] / 1e9, statistics.median(seconds)
        print(f"| {ahead} | {size / min(seconds):.1f} ({size / median:.1f}) |")
    print()


def gemm(cpu: Cpu, tokens: int, rounds: int) -> None:
    """Print the throughput of products of several tokens, by tile and width."""
    print(f"| {tokens} tokens, tile | " + " | ".join(f"{b} bits" for b in BITS) + " |")
    print("|---|" + "---|" * len(BITS))
    runs = {}
    for bits in BITS:
        for tile in TILES:
            format, tiled = Format(bits, 32, True, "float16"), replace(cpu, tile=tile)
            runs[bits, tile], _ = _product(format, tiled, tokens, copies=1)
    times = _time_rounds(runs, rounds)
    work = ROWS * COLUMNS * tokens / 1e9
    for tile in TILES:
        cells = [
            f"{work / min(seconds):.0f} ({work / statistics.median(seconds):.0f})"
            for seconds in (times[bits, tile] for bits in BITS)
        ]
        print(f"| {tile} | " + " | ".join(cells) + " |")
    print("\n10^9 products of two numbers a second, best (median)")


def _product(
    format: Format, cpu: Cpu, tokens: int, copies: int = COPIES
) -> tuple[Callable[[], None], int]:
    """Return a run of products with `copies` matrices in turn, and the bytes of one matrix."""
    function = linear(format, 0, cpu, 1 if tokens == 1 else None, bias=None, exact=False)
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    kernel = tvm.compile(module, tvm_target(cpu))["kernel"]
    groups = COLUMNS // format.group
    kinds = [(ROWS * COLUMNS * format.bits // 32, torch.uint32), (ROWS * groups, torch.float16)]
    if not format.symmetric:
        kinds.append((ROWS * groups * format.bits // 8, torch.uint8))
    # Memory that was never written maps to one page of zeros, which stays in the cache.
    matrices = [[_ones(size, dtype) for size, dtype in kinds] for _ in range(copies)]
    inputs = [
        torch.zeros(tokens, COLUMNS // 4, dtype=torch.int32),
        torch.zeros(tokens, groups),
        torch.zeros(tokens, groups, dtype=torch.int32),
    ]
    x, y = [tvm.runtime.from_dlpack(t) for t in inputs], torch.empty(tokens, ROWS)
    calls = [
        (*x, *map(tvm.runtime.from_dlpack, matrix), tvm.runtime.from_dlpack(y))
        for matrix in matrices
    ]

    def run() -> None:
        for args in calls:
            kernel(*args)

    return run, sum(t.numel() * t.element_size() for t in matrices[0])


def _ones(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(size * dtype.itemsize, dtype=torch.uint8).view(dtype).unsqueeze(0)


def _time_rounds(runs: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for key, run in runs.items():
            time.sleep(0.02)  # torch's threads keep the cores busy for a while
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
