"""Quantizers that others ship, for the tables: every weight matrix in one format, data-free.

Written from their published algorithms, not their code: llama.cpp's Q4_0 and Q8_0 round to
nearest, and HQQ (Badri & Shaji 2023, "Half-Quadratic Quantization") moves zero points for a
heavy-tailed error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lfmc.calib_free.roles import QUANTIZED, role
from lfmc.checkpoint import Checkpoint

LP, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20  # HQQ's own defaults


def ggml(weight: Tensor, bits: int) -> Tensor:
    """Groups of 32, symmetric, float16 scales: Q4_0 (the extreme sits at code 0) or Q8_0."""
    groups = weight.view(len(weight), -1, 32)
    place = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, place)
    if bits == 8:
        scale = (extreme.abs() / 127).half().float()
        low, high = -127, 127
    else:
        scale = (extreme / -(2 ** (bits - 1))).half().float()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = (groups / torch.where(scale == 0, torch.ones_like(scale), scale)).round()
    return (steps.clamp(low, high) * scale).view_as(weight)


def hqq(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """Half-quadratic quantization: float16 scales and float16 zero points."""
    w = weight.reshape(-1, group)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    top = 2**bits - 1
    inverse = (top / (high - low).clamp(min=1e-8)).clamp(max=2e4)
    zero = -low * inverse
    if bits == 4:
        zero = zero.round()
    beta, best, best_zero = BETA, torch.inf, zero
    for _ in range(ROUNDS):
        codes = (w * inverse + zero).round().clamp(0, top)
        wrong = w - (codes - zero) / inverse
        error = float(wrong.abs().mean())
        if error >= best:
            break
        best, best_zero = error, zero
        shrunk = wrong.sign() * (wrong.abs() - wrong.abs().pow(LP - 1) / beta).clamp(min=0)
        zero = (codes - (w - shrunk) * inverse).mean(1, keepdim=True)
        beta *= KAPPA
    codes = (w * inverse + best_zero).round().clamp(0, top)
    return ((codes - best_zero.half().float()) * (1 / inverse).half().float()).view_as(weight)


RIVALS: Mapping[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # name: (bits per weight of a matrix, its weights as they would be used)
    "q4_0": (4.5, lambda weight: ggml(weight, 4)),
    "q8_0": (8.5, lambda weight: ggml(weight, 8)),
    "hqq4": (4.5, lambda weight: hqq(weight, 4)),
    "hqq3": (3.5, lambda weight: hqq(weight, 3)),
    "hqq2": (2.5, lambda weight: hqq(weight, 2)),
}


def rival_weights(checkpoint: Checkpoint, name: str) -> tuple[float, dict[str, Tensor]]:
    """Bits per weight over all parameters, and float32 weights by name, of a rival."""
    bits, change = RIVALS[name]
    found, nbits = {}, 0.0
    for tensor, info in checkpoint.tensors.items():
        weight = checkpoint.load(tensor).float()
        matrix = role(tensor, info.shape) in QUANTIZED
        found[tensor] = change(weight) if matrix else weight
        nbits += info.numel * (bits if matrix else 8 * info.dtype.itemsize)
    return nbits / checkpoint.num_params, found
