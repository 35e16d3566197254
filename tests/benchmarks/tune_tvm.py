"""The TVM target's products on this machine: how near to memory they are, and which tile is best.

`python tests/benchmarks/tune_tvm.py [--cpu avx2]` times products of one token (a GEMV) by width
against reading the same bytes, and by how far ahead codes are asked for (`ahead` of
`lfmc.targets.tvm.kernels.cpus`), and products of 128 tokens by how many are taken at once (`tile`).
Matrices are of LFM2-350M's shapes, several one after the other, so that none stays in a cache of a
core. Candidates take turns; best and median of the rounds.
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
from lfmc.targets.tvm.compile import target_of
from lfmc.targets.tvm.kernels.cpus import CPUS, Cpu, this_cpu
from lfmc.targets.tvm.kernels.linear import linear
from lfmc.targets.tvm.runtime import cores, use_all_cores

ROWS, COLUMNS, COPIES = 9216, 1024, 16
TILES = (1, 2, 4, 6, 8, 12, 16)
AHEAD = (0, 512, 1024, 2048, 4096, 8192)
BITS = (2, 3, 4, 6, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", choices=CPUS, help="a family instead of this machine's")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    cpu = CPUS[asked.cpu] if asked.cpu else this_cpu()
    use_all_cores()
    torch.set_num_threads(cores())
    print(f"{cpu.name}, {cores()} threads, {COPIES} matrices {ROWS} x {COLUMNS}\n")
    gemv(cpu, asked.rounds)
    gemm(cpu, asked.tokens, asked.rounds)


def gemv(cpu: Cpu, rounds: int) -> None:
    runs: dict[Any, Callable[[], None]] = {}
    nbytes = {}
    for format in (Format(b, g, s, "float16") for b in BITS for g, s in ((32, False), (128, True))):
        runs[format], nbytes[format] = _product(format, cpu, 1)
    for format in list(runs):
        held = torch.ones(COPIES * nbytes[format] // 8, dtype=torch.int64)
        runs["read", format] = lambda held=held: held.sum()
        nbytes["read", format] = nbytes[format]
    times = _rounds(runs, rounds)
    print("| one token | GB/s, best (median) | of what torch reads of as many bytes |")
    print("|---|---|---|")
    for format in runs:
        if isinstance(format, Format):
            own, read = times[format], times["read", format]
            size = COPIES * nbytes[format] / 1e9
            share = statistics.median(read) / statistics.median(own)
            speed = f"{size / min(own):.1f} ({size / statistics.median(own):.1f})"
            print(f"| {format.name} | {speed} | {share:.0%} |")
    print()
    format = Format(4, 32, False, "float16")
    several = {a: _product(format, replace(cpu, ahead=a), 1) for a in AHEAD}
    times = _rounds({ahead: run for ahead, (run, _) in several.items()}, rounds)
    print("| bytes ahead | 4 bits, groups of 32: GB/s, best (median) |")
    print("|---|---|")
    for ahead, own in times.items():
        size = COPIES * several[ahead][1] / 1e9
        print(f"| {ahead} | {size / min(own):.1f} ({size / statistics.median(own):.1f}) |")
    print()


def gemm(cpu: Cpu, tokens: int, rounds: int) -> None:
    print(f"| {tokens} tokens, tile | " + " | ".join(f"{b} bits" for b in BITS) + " |")
    print("|---|" + "---|" * len(BITS))
    runs = {}
    for bits in BITS:
        for tile in TILES:
            own = replace(cpu, tile=tile)
            runs[bits, tile], _ = _product(Format(bits, 32, True, "float16"), own, tokens, copies=1)
    times = _rounds(runs, rounds)
    work = ROWS * COLUMNS * tokens / 1e9
    for tile in TILES:
        cells = [
            f"{work / min(own):.0f} ({work / statistics.median(own):.0f})"
            for own in (times[bits, tile] for bits in BITS)
        ]
        print(f"| {tile} | " + " | ".join(cells) + " |")
    print("\n10^9 products of two numbers a second, best (median)")


def _product(
    format: Format, cpu: Cpu, tokens: int, copies: int = COPIES
) -> tuple[Callable[[], None], int]:
    """Products with several matrices one after the other, and the bytes of one."""
    function = linear(format, 0, cpu, 1 if tokens == 1 else None, bias=None, exact=False)
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    kernel = tvm.compile(module, target_of(cpu))["kernel"]
    groups = COLUMNS // format.group
    kinds = [(ROWS * COLUMNS * format.bits // 32, torch.uint32), (ROWS * groups, torch.float16)]
    if not format.symmetric:
        kinds.append((ROWS * groups * format.bits // 8, torch.uint8))
    # Memory that was never written is one page of zeros, which caches hold.
    matrices = [[_written(size, dtype) for size, dtype in kinds] for _ in range(copies)]
    given = [
        torch.zeros(tokens, COLUMNS // 4, dtype=torch.int32),
        torch.zeros(tokens, groups),
        torch.zeros(tokens, groups, dtype=torch.int32),
    ]
    x, y = [tvm.runtime.from_dlpack(t) for t in given], torch.empty(tokens, ROWS)
    calls = [
        (*x, *map(tvm.runtime.from_dlpack, own), tvm.runtime.from_dlpack(y)) for own in matrices
    ]

    def run() -> None:
        for args in calls:
            kernel(*args)

    return run, sum(t.numel() * t.element_size() for t in matrices[0])


def _written(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(size * dtype.itemsize, dtype=torch.uint8).view(dtype).unsqueeze(0)


def _rounds(runs: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for key, run in runs.items():
            time.sleep(0.02)  # torch's threads keep cores busy for a while
            begun = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - begun)
    return times


if __name__ == "__main__":
    main()
