"""Method `alphaq`: AlphaQ as in its paper, within a byte budget.

Bit widths of expert matrices come from the sensitivities of `allocation.py`; every other matrix has
4 bits. Weights are rounded to the nearest point of a min/max grid. The format has asymmetric groups
of 64, or is the nearest one that the target supports. The paper rounds with GPTQ instead, which
needs calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from lfmc.calib_free.allocate.decision import Decision, nearest_format, unit_nbytes
from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.alphaq.allocation import BITS, MIN_VARIANCE, AlphaQOptions, sensitivities
from lfmc.calib_free.alphaq.bit_widths import choose_widths
from lfmc.calib_free.alphaq.spectra import pl_alpha_hill
from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.plan.roles import Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.machine.cache import cache_key, tensor_digest

RULE = "alphaq-1"  # increase the number after any change that affects a signal
NON_EXPERT_FORMAT = Format(4, 64, False, "float16")


def allocate_alphaq(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    units: Sequence[Unit],
    limit: int,
    options: AlphaQOptions,
    progress: Callable[[str], None],
    resources: Resources,
    device: str,
) -> dict[str, Decision]:
    """Choose formats for all matrices within `limit` bytes; spectra are computed on `device`.

    Raises `InputError` for a model without experts (the paper is about experts), for a bit width of
    `options` that the target does not support, or if the other matrices at 4 bits leave too few
    bytes. Raises `UnsupportedError` if the target supports none of the paper's bit widths.
    """
    experts = [unit for unit in units if unit.experts is not None]
    if not experts:
        raise InputError(
            "AlphaQ allocates bits between experts, and this model has none",
            where=checkpoint.path,
            todo="use --bits auto or uniform",
        )
    decisions: dict[str, Decision] = {}
    remaining = limit
    for unit in units:
        if unit.experts is None:
            number_format = nearest_format(NON_EXPERT_FORMAT, capabilities.formats(unit.role))
            remaining -= unit_nbytes(checkpoint, unit, number_format)
            for name in unit.names:
                reason = f"alphaq: {number_format.bits} bits outside the experts"
                decisions[name] = Decision(number_format, "minmax", reason)
    formats = _candidate_formats(capabilities, options.bits)
    alphas, weights = _measure_signals(checkpoint, experts, options, progress, resources, device)
    widths = _fit_widths(checkpoint, experts, formats, weights, remaining)
    for unit, width in zip(experts, widths, strict=True):
        for name in unit.names:
            alpha = alphas[name] if math.isfinite(alphas[name]) else None
            reason = "alphaq: no tail" if alpha is None else f"alphaq: tail exponent {alpha:.3f}"
            decisions[name] = Decision(formats[width], "minmax", reason, alpha=alpha)
    return decisions


def _candidate_formats(
    capabilities: Capabilities, requested: Sequence[int] | None
) -> dict[int, Format]:
    """Return the format of each candidate bit width; all share group, symmetry and scale dtype."""
    formats = [f for f in capabilities.expert if not f.palette]  # the paper has no palettes
    supported = {f.bits for f in formats}
    if requested is not None and not set(requested) <= supported:
        raise InputError(
            "the target does not support all of the requested bit widths for experts",
            expected="widths of " + (", ".join(map(str, sorted(supported))) or "none"),
            got=", ".join(map(str, requested)),
            todo="choose from the target's bit widths, or omit the option",
        )
    widths = sorted(supported & set(BITS if requested is None else requested))
    if not widths:
        raise UnsupportedError(
            "the target supports none of AlphaQ's bit widths for experts",
            expected=", ".join(map(str, BITS)),
            got=", ".join(map(str, sorted(supported))) or "none",
        )
    layouts = {_layout(f) for f in formats}
    formats_by_layout = {
        layout: {f.bits: f for f in formats if _layout(f) == layout} for layout in layouts
    }
    complete = [by_bits for by_bits in formats_by_layout.values() if set(widths) <= set(by_bits)]
    if not complete:
        raise UnsupportedError(
            "the target supports no group size that all of AlphaQ's bit widths share"
        )
    preferred = nearest_format(NON_EXPERT_FORMAT, [by_bits[widths[-1]] for by_bits in complete])
    return {width: formats_by_layout[_layout(preferred)][width] for width in widths}


def _layout(f: Format) -> tuple[int, bool, str]:
    return (f.group, f.symmetric, f.scale_dtype)


@dataclass(frozen=True)
class Task:
    """A matrix `[N, K]` in its stored dtype, and the options of its spectrum."""

    weight: Tensor
    block: int
    tail: float
    device: str


@dataclass(frozen=True)
class Signal:
    """The tail exponent of a matrix, infinite if it has no tail, and its population variance."""

    alpha: float
    variance: float


def measure_task(task: Task) -> Signal:
    """Compute the paper's two signals; runs on any worker."""
    alpha = pl_alpha_hill(task.weight, task.block, tail=task.tail, device=task.device)
    return Signal(alpha, float(task.weight.float().var(correction=0)))


def _measure_signals(
    checkpoint: Checkpoint,
    experts: Sequence[Unit],
    options: AlphaQOptions,
    progress: Callable[[str], None],
    resources: Resources,
    device: str,
) -> tuple[dict[str, float], list[float]]:
    """Return tail exponents by tensor name, and each unit's summed `sensitivity * variance`."""
    signals: dict[str, Signal] = {}
    missing: list[tuple[str, str]] = []

    def tasks() -> Iterator[Task]:
        for name in (name for unit in experts for name in unit.names):
            progress(f"spectra: {name}")
            weight = checkpoint.load(name)
            key = cache_key(RULE, device, options.block, options.tail, tensor_digest(weight))
            cached = resources.cache.get(key)
            if cached is None:
                missing.append((name, key))
                yield Task(weight, options.block, options.tail, device)
            else:
                signals[name] = Signal(**cached)

    for index, signal in enumerate(resources.workers.map(measure_task, tasks())):
        name, key = missing[index]
        signals[name] = signal
        resources.cache.put(key, asdict(signal))
    alphas = {name: signals[name].alpha for unit in experts for name in unit.names}
    sensitivity_values = sensitivities(list(alphas.values()), options.gamma).tolist()
    sensitivity_by_name = dict(zip(alphas, sensitivity_values, strict=True))
    weights = [
        sum(
            sensitivity_by_name[name] * max(signals[name].variance, MIN_VARIANCE)
            for name in unit.names
        )
        for unit in experts
    ]
    return alphas, weights


def _fit_widths(
    checkpoint: Checkpoint,
    experts: Sequence[Unit],
    formats: dict[int, Format],
    weights: Sequence[float],
    limit: int,
) -> list[int]:
    """Return the bit widths for the largest total number of bits that fits in `limit` bytes."""
    counts = [len(unit.names) for unit in experts]
    narrow, wide = min(formats), max(formats)
    min_size = sum(unit_nbytes(checkpoint, unit, formats[narrow]) for unit in experts)
    if min_size > limit:
        raise InputError(
            "AlphaQ does not fit the budget: everything outside the experts takes 4 bits",
            expected=f"at least {min_size} bytes for the experts at {narrow} bits",
            got=f"{max(limit, 0)} bytes",
            todo="raise the budget, or use --bits auto",
        )
    max_size = sum(unit_nbytes(checkpoint, unit, formats[wide]) for unit in experts)
    share = 1.0 if max_size == min_size else min(1.0, (limit - min_size) / (max_size - min_size))
    total = sum(counts) * narrow + math.ceil(share * sum(counts) * (wide - narrow))
    while True:
        widths = choose_widths(weights, counts, sorted(formats), total)
        size = sum(
            unit_nbytes(checkpoint, unit, formats[width])
            for unit, width in zip(experts, widths, strict=True)
        )
        if size <= limit:
            return widths
        total = sum(width * count for width, count in zip(widths, counts, strict=True)) - 1
