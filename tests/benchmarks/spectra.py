"""The tail exponent of a matrix, against one SVD a block.

`python tests/benchmarks/spectra.py [MODEL] [--threads N] [--device cuda]` times `pl_alpha_hill`
and a loop of float32 `torch.linalg.svdvals` over 128 x 128 blocks, in interleaved rounds, on random
matrices of LFM2-8B-A1B's expert shape and on heavy-tailed ones, all rounded to bfloat16. With MODEL
also the largest expert matrices, or others, of that checkpoint. The loop has one thread, which is
when it is fastest. The error is the difference to the exponent of float64 SVDs.
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
    parser.add_argument("--device", default="cpu", help="of pl_alpha_hill; the loop is on the CPU")
    asked = parser.parse_args()
    print(f"{asked.threads} threads, {asked.device}, {asked.rounds} interleaved rounds\n")
    print("| matrix | SVD a block, ms | pl_alpha_hill, ms | ratio: min (median) | alpha | error |")
    print("|---|---|---|---|---|---|")
    errors = []
    for name, weight in matrices(asked.model).items():
        errors.append(compare(name, weight, asked.rounds, asked.threads, asked.device))
    print(f"\nworst error: {max(errors):.1e}")


def matrices(model: str | None) -> dict[str, Tensor]:
    """The matrices to compare on, bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, columns = SHAPE
    ratio = (normal(rows, columns).square() + normal(rows, columns).square()) / 2
    found = {
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
        found |= {name: checkpoint.load(name) for name in names[:4]}
    return {name: weight.to(torch.bfloat16) for name, weight in found.items()}


def _power_law(normal: Callable[..., Tensor], rows: int, columns: int) -> Tensor:
    """Singular values that fall with the square root of their rank."""
    left, right = (torch.linalg.qr(normal(size, rows)).Q for size in (rows, columns))
    return 40 * (left * torch.arange(1, rows + 1) ** -0.5) @ right.T


def compare(name: str, weight: Tensor, rounds: int, threads: int, device: str) -> float:
    """Time both sides in turn and print a row; the size of the error."""
    slow, fast = [], []
    for index in range(rounds + 1):
        torch.set_num_threads(1)
        start = time.perf_counter()
        for piece in pieces(weight):
            torch.linalg.svdvals(piece.float())
        middle = time.perf_counter()
        torch.set_num_threads(threads)
        alpha = pl_alpha_hill(weight, device=device)
        end = time.perf_counter()
        if index:  # the first round warms up
            slow.append(middle - start)
            fast.append(end - middle)
    error = alpha - exact(weight)
    medians = statistics.median(slow) / statistics.median(fast)
    print(
        f"| {name} | {1000 * min(slow):.1f} | {1000 * min(fast):.1f} "
        f"| {min(slow) / min(fast):.1f} ({medians:.1f}) "
        f"| {alpha:.3f} | {error:+.1e} |"
    )
    return abs(error)


def pieces(weight: Tensor) -> list[Tensor]:
    """All whole blocks, as views."""
    rows, columns = weight.shape
    return [
        weight[i : i + BLOCK, j : j + BLOCK]
        for i in range(0, rows - BLOCK + 1, BLOCK)
        for j in range(0, columns - BLOCK + 1, BLOCK)
    ]


def exact(weight: Tensor) -> float:
    """Hill's estimator from a float64 SVD a block."""
    values = torch.cat([torch.linalg.svdvals(piece.double()) for piece in pieces(weight)])
    pooled = values.square().sort(descending=True).values
    tail = max(10, pooled.numel() // 10)
    return 1 + tail / float((pooled[:tail] / pooled[tail]).log().sum())


if __name__ == "__main__":
    main()
