"""Parity: four rungs, each with its own number, so that a failure says where it broke.

1. the decoder against transformers, float32
2. the graph after passes against the decoder, on the same quantized weights
3. the artifact, run by its runtime, against the same quantized weights in torch
4. the artifact against the float32 reference, on text

Rungs 1 to 3 run the matrix of `cases`: every way in which an app feeds tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lfmc.model import DecoderConfig
from lfmc.parity.expert_choices import Choice, Choosing, first_turned, joined
from lfmc.run.stepper import Stepper, gives_last_only

# Largest difference of a logit over the largest logit, for float32 arithmetic in another order.
FLOAT_TOLERANCE = 1e-5
ARTIFACT_TOLERANCE = 1e-4
EARLIER = 16  # tokens of an earlier prompt, at most


@dataclass(frozen=True)
class Case:
    """One way to feed a prompt: the sizes of the calls, after an earlier prompt or not."""

    name: str
    calls: tuple[int, ...]
    earlier: int = 0

    @property
    def length(self) -> int:
        return sum(self.calls)


@dataclass(frozen=True)
class CaseResult:
    """The largest difference of a logit, over the largest logit of the reference.

    The last `apart` tokens, from the first on for which a near tie between experts was turned, are
    not in it; among them it is `difference_apart`.
    """

    case: str
    difference: float
    same_top1: float
    apart: int = 0
    difference_apart: float = 0.0


@dataclass(frozen=True)
class Rung:
    """One rung: what was compared, the worst case, and whether it is within the tolerance.

    `skipped` says why nothing was compared; a skipped rung has not passed. `first` is, where all
    operators were compared one by one, the first with more than is allowed: `case` is its value.
    """

    number: int
    title: str
    tolerance: float | None
    cases: tuple[CaseResult, ...] = ()
    skipped: str | None = None
    first: CaseResult | None = None

    @property
    def worst(self) -> float | None:
        return max((case.difference for case in self.cases), default=None)

    @property
    def passed(self) -> bool:
        if self.worst is None or not math.isfinite(self.worst):
            return False
        return self.tolerance is None or self.worst <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst": self.worst, "passed": self.passed}


def cases(config: DecoderConfig, context: int, *, full: bool) -> tuple[Case, ...]:
    """The matrix for a model: its sliding window is passed where it has one and context allows."""
    matrix = [
        Case("prefill, then decode", (24, *[1] * 16)),
        Case("reset, then another prompt", (9, 1, 1), earlier=min(7, context)),
    ]
    if full:
        matrix += [
            Case("one shot", (24,)),
            Case("chunked prefill", (8, 9, 7)),
            Case("one-token prompt", (1,) * 8),
        ]
        window = config.sliding_window
        if window and window + 6 <= context:
            calls = (max(1, window - 4), 5, 1, 1, 1, 1, 1)
            matrix.append(Case("past the sliding window", calls))
    return tuple(replace(case, calls=_within(case.calls, context)) for case in matrix)


def _within(calls: tuple[int, ...], context: int) -> tuple[int, ...]:
    """As many of the calls as fit a context; the first is cut where it alone does not."""
    kept = [min(calls[0], context)]
    for size in calls[1:]:
        if sum(kept) + size <= context:
            kept.append(size)
    return tuple(kept)


def run_case(
    side: Stepper, case: Case, tokens: Tensor, earlier: Tensor, *, ends: bool = False
) -> tuple[Tensor, Choice | None]:
    """Logits `[T, V]` of the first `case.length` of `tokens`, fed as the case says, or with `ends`
    of the last token of each call; and what all of them chose, where the side tells."""
    side.reset()
    if case.earlier:
        side.step(earlier[: case.earlier])
        side.reset()
    logits, choices = [], []
    for piece in tokens[..., : case.length].split(list(case.calls), dim=-1):
        found = side.step(piece)
        logits.append(found[..., -1:, :] if ends else found)
        if isinstance(side, Choosing) and side.choice is not None:
            choices.append(side.choice)
    return torch.cat(logits, dim=-2), joined(choices) if choices else None


@dataclass(frozen=True)
class Pair:
    """Logits `[T, V]` of both sides for one case; of `[T, V]` only the first `clear` tokens come
    before a near tie of experts was turned, all for None."""

    ours: Tensor
    theirs: Tensor
    clear: int | None


def draw_tokens(length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """A prompt of `length` random tokens, int64, and an earlier one: always the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocab_size, (length + EARLIER,), generator=generator)
    return drawn[:length], drawn[length:]


def run_both(
    side: Stepper,
    reference: Stepper,
    case: Case,
    tokens: Tensor,
    earlier: Tensor,
    *,
    near_tie: float = 0.0,
) -> Pair:
    """Run a case on both sides; where `side` gives logits of a call's last token only, both do."""
    ends = gives_last_only(side)
    ours, our_choice = run_case(side, case, tokens, earlier, ends=ends)
    theirs, choice = run_case(reference, case, tokens, earlier, ends=ends)
    clear = None
    if our_choice is not None and choice is not None:
        turned = first_turned(our_choice, choice)
        if turned is not None and turned[1] <= near_tie:
            calls = sum(end <= turned[0] for end in accumulate(case.calls))
            clear = calls if ends else turned[0]
    return Pair(ours, theirs, clear)


def compare(
    number: int,
    title: str,
    side: Stepper,
    reference: Stepper,
    matrix: Sequence[Case],
    vocab_size: int,
    *,
    tolerance: float | None,
    near_tie: float = 0.0,
    tokens: Tensor | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Rung:
    """Run the matrix on both sides with the same tokens (`[T]` int64; random ones by default).

    Where both sides tell which experts were chosen, a choice may be turned if it was within
    `near_tie`; what follows is counted apart. Where `side` gives logits of a call's last token
    only, these are compared.
    """
    prompt, earlier = draw_tokens(max(case.length for case in matrix), vocab_size)
    results = []
    for case in matrix:
        progress(case.name)
        given = prompt if tokens is None else tokens
        pair = run_both(side, reference, case, given, earlier, near_tie=near_tie)
        results.append(difference(case.name, pair.ours, pair.theirs, pair.clear))
    return Rung(number, title, tolerance, tuple(results))


def difference(name: str, ours: Tensor, theirs: Tensor, clear: int | None = None) -> CaseResult:
    """Compare logits `[..., V]`; anything that is not finite counts as an infinite difference.

    With `clear`, of `[T, V]` the first so many tokens, and those behind apart.
    """
    if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all()):
        return CaseResult(name, float("inf"), 0.0)
    scale = max(float(theirs.abs().max()), 1e-30)
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    off = (ours - theirs).abs() / scale
    if clear is None:
        return CaseResult(name, float(off.max()), same)
    worst = float(off[:clear].max()) if clear else 0.0
    return CaseResult(name, worst, same, len(off) - clear, float(off[clear:].max()))


def operators_rung(title: str, tolerance: float, results: Iterable[CaseResult]) -> Rung:
    """Rung 3 for operators one by one: of each kind (their `case`) the worst."""
    worst: dict[str, CaseResult] = {}
    for result in results:
        if result.case not in worst or result.difference > worst[result.case].difference:
            worst[result.case] = result
    if not worst:
        return skipped(3, title, "the artifact has no n-bit operators")
    return Rung(3, title, tolerance, tuple(worst.values()))


def skipped(number: int, title: str, reason: str) -> Rung:
    """A rung that could not be climbed, with the reason."""
    return Rung(number, title, None, (), reason)
