"""Compare the speed of the tail exponent of a matrix with one SVD per block.

`python tests/benchmarks/spectra.py [MODEL] [--threads N] [--device cuda]` times `pl_alpha_hill`
and a loop of float32 `torch.linalg.svdvals` over 128 x 128 blocks, in interleaved rounds. The
matrices are random ones of LFM2-8B-A1B's expert shape and heavy-tailed ones, all rounded to
bfloat16. With MODEL, the largest expert matrices (or other matrices) of that checkpoint are added.
The loop has one thread, because it is fastest with one. The error is the difference from the
exponent of float64 SVDs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lfmc.calib_free.alphaq.spectra import pl_alpha_hill
from lfmc.checkpoint.checkpoint import open_checkpoint

BLOCK = 128
SHAPE = (1792, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--device", default="cpu", help="device of pl_alpha_hill; the loop runs on the CPU"
    )
    options = parser.parse_args()
    print(f"{options.threads} threads, {options.device}, {options.rounds} interleaved rounds\n")
    print(
        "| matrix | SVD per block, ms | pl_alpha_hill, ms | ratio: min (median) | alpha | error |"
    )
    print("|---|---|---|---|---|---|")
    errors = []
    for name, weight in matrices(options.model).items():
        errors.append(compare(name, weight, options.rounds, options.threads, options.device))
    print(f"\nworst error: {max(errors):.1e}")


def matrices(model: str | None) -> dict[str, Tensor]:
    """Return the matrices to compare on, bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, columns = SHAPE
    ratio = (normal(rows, columns).square() + normal(rows, columns).square()) / 2
    weights = {
        "Gaussian": normal(rows, columns),
        "Gaussian, transposed shape": normal(columns, rows),
        "Student t, 4 degrees of freedom": normal(rows, columns) / ratio.sqrt(),
        "low rank plus noise": normal(rows, columns) + 0.2 * normal(rows, 48) @ normal(48, columns),
        "power law": _power_law(normal, rows, columns),
        "one dominating value": normal(rows, columns) + 20 * normal(rows, 1) @ normal(1, columns),
    }
    if model is not None:
        checkpoint = open_checkpoint(model)
        names = [n for n, info in checkpoint.tensors.items() if len(info.shape) == 2]
        names.sort(key=lambda n: (".experts." in n, checkpoint.tensors[n].numel), reverse=True)
        weights |= {name: checkpoint.load(name) for name in names[:4]}
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def _power_law(normal: Callable[..., Tensor], rows: int, columns: int) -> Tensor:
    """Return a matrix whose singular values fall with the square root of their rank."""
    left, right = (torch.linalg.qr(normal(size, rows)).Q for size in (rows, columns))
    return 40 * (left * torch.arange(1, rows + 1) ** -0.5) @ right.T


def compare(name: str, weight: Tensor, rounds: int, threads: int, device: str) -> float:
    """Time the SVD loop and `pl_alpha_hill` in turn, print a row, and return the absolute error."""
    svd_seconds, hill_seconds = [], []
    for index in range(rounds + 1):
        torch.set_num_threads(1)
        start = time.perf_counter()
        for piece in whole_blocks(weight):
            torch.linalg.svdvals(piece.float())
        middle = time.perf_counter()
        torch.set_num_threads(threads)
        alpha = pl_alpha_hill(weight, device=device)
        end = time.perf_counter()
        if index:  # the first round warms up
            svd_seconds.append(middle - start)
            hill_seconds.append(end - middle)
    error = alpha - exact_alpha(weight)
    medians = statistics.median(svd_seconds) / statistics.median(hill_seconds)
    print(
        f"| {name} | {1000 * min(svd_seconds):.1f} | {1000 * min(hill_seconds):.1f} "
        f"| {min(svd_seconds) / min(hill_seconds):.1f} ({medians:.1f}) "
        f"| {alpha:.3f} | {error:+.1e} |"
    )
    return abs(error)


def whole_blocks(weight: Tensor) -> list[Tensor]:
    """Return all whole blocks, as views."""
    rows, columns = weight.shape
    return [
        weight[i : i + BLOCK, j : j + BLOCK]
        for i in range(0, rows - BLOCK + 1, BLOCK)
        for j in range(0, columns - BLOCK + 1, BLOCK)
    ]


def exact_alpha(weight: Tensor) -> float:
    """Return Hill's estimator from one float64 SVD per block."""
    values = torch.cat([torch.linalg.svdvals(piece.double()) for piece in whole_blocks(weight)])
    pooled = values.square().sort(descending=True).values
    tail = max(10, pooled.numel() // 10)
    return 1 + tail / float((pooled[:tail] / pooled[tail]).log().sum())


if __name__ == "__main__":
    main()
