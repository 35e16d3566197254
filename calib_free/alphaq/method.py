"""Method `alphaq`: AlphaQ as its paper has it, inside a byte budget.

Widths of expert matrices come from `allocation.py` beside it; every other matrix takes 4 bits.
Rounding is to the nearest point of a min/max grid, groups of 64, asymmetric, or the nearest
format that the target has: the paper's GPTQ needs calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from lfmc.calib_free.allocate.decision import Decision, nearest, unit_nbytes
from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.alphaq.allocation import BITS, MIN_VARIANCE, AlphaQOptions, sensitivities
from lfmc.calib_free.alphaq.bit_widths import choose_widths
from lfmc.calib_free.alphaq.spectra import pl_alpha_hill
from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.plan.roles import Unit
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.machine.cache import key_of, tensor_digest

RULE = "alphaq-1"  # raise the number when anything changes that a signal depends on
OTHERS = Format(4, 64, False, "float16")


def allocate_paper(
    checkpoint: Checkpoint,
    capabilities: Capabilities,
    found: Sequence[Unit],
    limit: int,
    options: AlphaQOptions,
    progress: Callable[[str], None],
    resources: Resources,
    device: str,
) -> dict[str, Decision]:
    """Formats for every matrix of the units within `limit` bytes; spectra are taken on `device`.

    Raises `InputError` on a model without experts (the paper is about experts), for a width of
    `options` that the target lacks, or where the rest at 4 bits leaves too little, and
    `UnsupportedError` where the target has none of the paper's widths.
    """
    experts = [unit for unit in found if unit.experts is not None]
    if not experts:
        raise InputError(
            "AlphaQ allocates bits between experts, and this model has none",
            where=checkpoint.path,
            todo="use --bits auto or uniform",
        )
    decisions: dict[str, Decision] = {}
    left = limit
    for unit in found:
        if unit.experts is None:
            own = nearest(OTHERS, capabilities.formats(unit.role))
            left -= unit_nbytes(checkpoint, unit, own)
            for name in unit.names:
                reason = f"alphaq: {own.bits} bits outside the experts"
                decisions[name] = Decision(own, "minmax", reason)
    formats = _formats(capabilities, options.bits)
    alphas, weights = _signals(checkpoint, experts, options, progress, resources, device)
    widths = _fit(checkpoint, experts, formats, weights, left)
    for unit, width in zip(experts, widths, strict=True):
        for name in unit.names:
            alpha = alphas[name] if math.isfinite(alphas[name]) else None
            reason = "alphaq: no tail" if alpha is None else f"alphaq: tail exponent {alpha:.3f}"
            decisions[name] = Decision(formats[width], "minmax", reason, alpha=alpha)
    return decisions


def _formats(capabilities: Capabilities, asked: Sequence[int] | None) -> dict[int, Format]:
    """The format of each candidate width; all of one group and symmetry."""
    grids = [f for f in capabilities.expert if not f.palette]  # the paper knows no others
    found = {f.bits for f in grids}
    if asked is not None and not set(asked) <= found:
        raise InputError(
            "the target can't store experts at all of the widths that were asked for",
            expected="widths of " + (", ".join(map(str, sorted(found))) or "none"),
            got=", ".join(map(str, asked)),
            todo="choose among the target's, or leave the choice to lfmc",
        )
    widths = sorted(found & set(BITS if asked is None else asked))
    if not widths:
        raise UnsupportedError(
            "the target has none of AlphaQ's widths for experts",
            expected=", ".join(map(str, BITS)),
            got=", ".join(map(str, sorted(found))) or "none",
        )
    layouts = {_layout(f) for f in grids}
    whole = {layout: {f.bits: f for f in grids if _layout(f) == layout} for layout in layouts}
    full = [by_bits for by_bits in whole.values() if set(widths) <= set(by_bits)]
    if not full:
        raise UnsupportedError("the target has no group size that all of AlphaQ's widths share")
    best = nearest(OTHERS, [by_bits[widths[-1]] for by_bits in full])
    return {width: whole[_layout(best)][width] for width in widths}


def _layout(f: Format) -> tuple[int, bool, str]:
    return (f.group, f.symmetric, f.scale_dtype)


@dataclass(frozen=True)
class Task:
    """A matrix `[N, K]` whose spectrum is to be measured, in the dtype that is stored."""

    weight: Tensor
    block: int
    tail: float
    device: str


@dataclass(frozen=True)
class Signal:
    """A matrix's tail exponent, infinite where it has none, and its population variance."""

    alpha: float
    variance: float


def measure_task(task: Task) -> Signal:
    """The paper's two signals: work for any worker."""
    alpha = pl_alpha_hill(task.weight, task.block, tail=task.tail, device=task.device)
    return Signal(alpha, float(task.weight.float().var(correction=0)))


def _signals(
    checkpoint: Checkpoint,
    experts: Sequence[Unit],
    options: AlphaQOptions,
    progress: Callable[[str], None],
    resources: Resources,
    device: str,
) -> tuple[dict[str, float], list[float]]:
    """Tail exponents by tensor name, and the summed `sensitivity * variance` of each unit."""
    found: dict[str, Signal] = {}
    missing: list[tuple[str, str]] = []

    def tasks() -> Iterator[Task]:
        for name in (n for unit in experts for n in unit.names):
            progress(f"spectra: {name}")
            weight = checkpoint.load(name)
            key = key_of(RULE, device, options.block, options.tail, tensor_digest(weight))
            kept = resources.cache.get(key)
            if kept is None:
                missing.append((name, key))
                yield Task(weight, options.block, options.tail, device)
            else:
                found[name] = Signal(**kept)

    for index, made in enumerate(resources.workers.map(measure_task, tasks())):
        name, key = missing[index]
        found[name] = made
        resources.cache.put(key, asdict(made))
    alphas = {name: found[name].alpha for unit in experts for name in unit.names}
    sensitive = sensitivities(list(alphas.values()), options.gamma).tolist()
    shares = dict(zip(alphas, sensitive, strict=True))
    weights = [
        sum(shares[name] * max(found[name].variance, MIN_VARIANCE) for name in unit.names)
        for unit in experts
    ]
    return alphas, weights


def _fit(
    checkpoint: Checkpoint,
    experts: Sequence[Unit],
    formats: dict[int, Format],
    weights: Sequence[float],
    left: int,
) -> list[int]:
    """Widths under the largest total of bits whose bytes fit in `left`."""
    counts = [len(unit.names) for unit in experts]
    narrow, wide = min(formats), max(formats)
    low = sum(unit_nbytes(checkpoint, unit, formats[narrow]) for unit in experts)
    if low > left:
        raise InputError(
            "AlphaQ does not fit the budget: everything outside the experts takes 4 bits",
            expected=f"at least {low} bytes for the experts at {narrow} bits",
            got=f"{max(left, 0)} bytes",
            todo="raise the budget, or use --bits auto",
        )
    high = sum(unit_nbytes(checkpoint, unit, formats[wide]) for unit in experts)
    share = 1.0 if high == low else min(1.0, (left - low) / (high - low))
    total = sum(counts) * narrow + math.ceil(share * sum(counts) * (wide - narrow))
    while True:
        widths = choose_widths(weights, counts, sorted(formats), total)
        size = sum(
            unit_nbytes(checkpoint, unit, formats[width])
            for unit, width in zip(experts, widths, strict=True)
        )
        if size <= left:
            return widths
        total = sum(w * n for w, n in zip(widths, counts, strict=True)) - 1
