"""Quantizers that others ship, data-free, for the tables.

Written from their published algorithms, not their code. One format for every weight matrix:
llama.cpp's Q4_0 and Q8_0 round to nearest, and HQQ (Badri & Shaji 2023, "Half-Quadratic
Quantization") moves zero points for a heavy-tailed error. Two widths: Olive's selective mixed
precision by signal-to-noise ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.plan.roles import QUANTIZED, role
from lfmc.checkpoint.checkpoint import Checkpoint

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


def clip(weight: Tensor, bits: int) -> Tensor:
    """The searched range of `calib_free.grids`, groups of 64, all columns alike."""
    return quantize(weight, Format(bits, 64, False, "float16"), None, "clip").dequantize()


RIVALS: Mapping[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # name: (bits per weight of a matrix, its weights as they would be used)
    "q4_0": (4.5, lambda weight: ggml(weight, 4)),
    "q8_0": (8.5, lambda weight: ggml(weight, 8)),
    "hqq4": (4.5, lambda weight: hqq(weight, 4)),
    "hqq3": (3.5, lambda weight: hqq(weight, 3)),
    "hqq2": (2.5, lambda weight: hqq(weight, 2)),
    # No rivals: lfmc's own grid with nothing but the weights, in HQQ's groups.
    "clip4": (4.3125, lambda weight: clip(weight, 4)),
    "clip3": (3.296875, lambda weight: clip(weight, 3)),
    "clip2": (2.28125, lambda weight: clip(weight, 2)),
}


OLIVE = {"olive4.5": (4.5, 4, 8), "olive3.5": (3.5, 2, 4), "olive2.5": (2.5, 2, 4)}


def olive(
    checkpoint: Checkpoint, budget: float, narrow: int, wide: int
) -> tuple[float, dict[str, Tensor]]:
    """Olive's `SelectiveMixedPrecision` with algorithm "snr", as far as a budget reaches.

    Matrices with the least ratio of energy to squared error at the narrow width take the wide one.
    Both are asymmetric min/max grids with groups of 64. Olive takes a share of the parameters; here
    that is the largest whose bytes fit `budget` bits a weight.
    """
    low, high = (Format(bits, 64, False, "float16") for bits in (narrow, wide))
    nbytes, ratios = 0, {}
    found = {}
    for name, info in checkpoint.tensors.items():
        weight = checkpoint.load(name).float()
        found[name] = weight
        nbytes += info.numel * info.dtype.itemsize
        if role(name, info.shape) in QUANTIZED:
            nbytes += low.nbytes(info.shape) - info.numel * info.dtype.itemsize
            found[name] = quantize(weight, low, None, "minmax").dequantize()
            wrong = (weight - found[name]).square().sum()
            ratios[name] = float(weight.square().sum() / wrong)
    for name in sorted(ratios, key=ratios.__getitem__):
        shape = checkpoint.tensors[name].shape
        more = high.nbytes(shape) - low.nbytes(shape)
        if nbytes + more > budget * checkpoint.num_params / 8:
            break
        nbytes += more
        weight = checkpoint.load(name).float()
        found[name] = quantize(weight, high, None, "minmax").dequantize()
    return 8 * nbytes / checkpoint.num_params, found


def rival_weights(checkpoint: Checkpoint, name: str) -> tuple[float, dict[str, Tensor]]:
    """Bits per weight over all parameters, and float32 weights by name, of a rival."""
    if name in OLIVE:
        return olive(checkpoint, *OLIVE[name])
    bits, change = RIVALS[name]
    found, nbits = {}, 0.0
    for tensor, info in checkpoint.tensors.items():
        weight = checkpoint.load(tensor).float()
        matrix = role(tensor, info.shape) in QUANTIZED
        found[tensor] = change(weight) if matrix else weight
        nbits += info.numel * (bits if matrix else 8 * info.dtype.itemsize)
    return nbits / checkpoint.num_params, found
