"""Data-free quantizers of other projects, for the benchmark tables.

They are written from the published algorithms, not from the projects' code. Some use one format for
every weight matrix: llama.cpp's Q4_0 and Q8_0 round to nearest, and HQQ (Badri & Shaji 2023,
"Half-Quadratic Quantization") moves zero points for a heavy-tailed error. Olive's selective mixed
precision uses two bit widths, chosen by signal-to-noise ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lfmc.calib_free.grid.formats import Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.plan.roles import QUANTIZED_ROLES, tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint

LP, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20  # HQQ's own defaults


def ggml(weight: Tensor, bits: int) -> Tensor:
    """Return dequantized Q4_0 (extreme at code 0) or Q8_0.

    The groups are symmetric and have 32 columns and float16 scales.
    """
    groups = weight.view(len(weight), -1, 32)
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)
    if bits == 8:
        scale = (extreme.abs() / 127).half().float()
        low, high = -127, 127
    else:
        scale = (extreme / -(2 ** (bits - 1))).half().float()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = (groups / torch.where(scale == 0, torch.ones_like(scale), scale)).round()
    return (steps.clamp(low, high) * scale).view_as(weight)


def hqq(weight: Tensor, bits: int, group: int = 64) -> Tensor:
    """Return dequantized HQQ, with float16 scales and float16 zero points."""
    groups = weight.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    max_code = 2**bits - 1
    inverse = (max_code / (high - low).clamp(min=1e-8)).clamp(max=2e4)
    zero = -low * inverse
    if bits == 4:
        zero = zero.round()
    beta, best, best_zero = BETA, torch.inf, zero
    for _ in range(ROUNDS):
        codes = (groups * inverse + zero).round().clamp(0, max_code)
        residual = groups - (codes - zero) / inverse
        error = float(residual.abs().mean())
        if error >= best:
            break
        best, best_zero = error, zero
        shrunk = residual.sign() * (residual.abs() - residual.abs().pow(LP - 1) / beta).clamp(min=0)
        zero = (codes - (groups - shrunk) * inverse).mean(1, keepdim=True)
        beta *= KAPPA
    codes = (groups * inverse + best_zero).round().clamp(0, max_code)
    return ((codes - best_zero.half().float()) * (1 / inverse).half().float()).view_as(weight)


def clip(weight: Tensor, bits: int) -> Tensor:
    """Return dequantized `clip` of `calib_free.grid`: groups of 64, equal column weights."""
    return quantize(weight, Format(bits, 64, False, "float16"), None, "clip").dequantize()


RIVALS: Mapping[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # name: (bits per weight of a matrix, function that returns its dequantized weights)
    "q4_0": (4.5, lambda weight: ggml(weight, 4)),
    "q8_0": (8.5, lambda weight: ggml(weight, 8)),
    "hqq4": (4.5, lambda weight: hqq(weight, 4)),
    "hqq3": (3.5, lambda weight: hqq(weight, 3)),
    "hqq2": (2.5, lambda weight: hqq(weight, 2)),
    # For comparison: lfmc's clip search with nothing but the weights, in HQQ's groups.
    "clip4": (4.3125, lambda weight: clip(weight, 4)),
    "clip3": (3.296875, lambda weight: clip(weight, 3)),
    "clip2": (2.28125, lambda weight: clip(weight, 2)),
}


OLIVE = {"olive4.5": (4.5, 4, 8), "olive3.5": (3.5, 2, 4), "olive2.5": (2.5, 2, 4)}


def olive(
    checkpoint: Checkpoint, budget: float, narrow: int, wide: int
) -> tuple[float, dict[str, Tensor]]:
    """Apply Olive's `SelectiveMixedPrecision` with algorithm "snr" within a budget.

    Matrices with the smallest ratio of energy to squared error at the narrow bit width use the wide
    one. Both widths use asymmetric min/max grids with groups of 64. Olive has a share of the
    parameters as its option; here it is the largest share that fits `budget` bits per weight.
    Returns bits per weight over all parameters, and float32 weights by name.
    """
    low, high = (Format(bits, 64, False, "float16") for bits in (narrow, wide))
    nbytes, ratios = 0, {}
    weights = {}
    for name, info in checkpoint.tensors.items():
        weight = checkpoint.load(name).float()
        weights[name] = weight
        nbytes += info.numel * info.dtype.itemsize
        if tensor_role(name, info.shape) in QUANTIZED_ROLES:
            nbytes += low.nbytes(info.shape) - info.numel * info.dtype.itemsize
            weights[name] = quantize(weight, low, None, "minmax").dequantize()
            squared_error = (weight - weights[name]).square().sum()
            ratios[name] = float(weight.square().sum() / squared_error)
    for name in sorted(ratios, key=ratios.__getitem__):
        shape = checkpoint.tensors[name].shape
        extra = high.nbytes(shape) - low.nbytes(shape)
        if nbytes + extra > budget * checkpoint.num_params / 8:
            break
        nbytes += extra
        weight = checkpoint.load(name).float()
        weights[name] = quantize(weight, high, None, "minmax").dequantize()
    return 8 * nbytes / checkpoint.num_params, weights


def rival_weights(checkpoint: Checkpoint, name: str) -> tuple[float, dict[str, Tensor]]:
    """Return bits per weight over all parameters, and float32 weights by name, of a rival."""
    if name in OLIVE:
        return olive(checkpoint, *OLIVE[name])
    bits, quantizer = RIVALS[name]
    weights, nbits = {}, 0.0
    for tensor, info in checkpoint.tensors.items():
        weight = checkpoint.load(tensor).float()
        quantized = tensor_role(tensor, info.shape) in QUANTIZED_ROLES
        weights[tensor] = quantizer(weight) if quantized else weight
        nbits += info.numel * (bits if quantized else 8 * info.dtype.itemsize)
    return nbits / checkpoint.num_params, weights
