"""Compares the logits of two models. Parity has four rungs, each with its own number.

1. the decoder against transformers, float32
2. the graph after the passes against the decoder, on the same quantized weights
3. the artifact, run by its runtime, against torch on the same quantized weights
4. the artifact against the float32 reference, on text

The number of the first rung that fails shows which stage is wrong. Rungs 1 to 3 run the matrix of
`cases`, which covers every way in which an app feeds tokens.
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
from lfmc.parity.expert_choices import (
    ExpertChoice,
    RecordsExpertChoice,
    concat_choices,
    find_changed_choice,
)
from lfmc.run.stepper import Stepper, returns_last_only

# Largest logit difference over the largest logit, for float32 arithmetic in a different order.
FLOAT_TOLERANCE = 1e-5
ARTIFACT_TOLERANCE = 1e-4
MAX_EARLIER = 16  # tokens of the prompt before a reset


@dataclass(frozen=True)
class Case:
    """One way to feed a prompt: the number of tokens in each call.

    If `earlier` is not 0, an earlier prompt of that many tokens and a reset come first.
    """

    name: str
    calls: tuple[int, ...]
    earlier: int = 0

    @property
    def length(self) -> int:
        return sum(self.calls)


@dataclass(frozen=True)
class CaseResult:
    """The largest logit difference, divided by the largest logit of the reference.

    If the two models decide a near tie between experts differently, the tokens from there on are
    compared separately: the last `apart` tokens are not part of `difference`. The largest
    difference of these tokens is `difference_apart`.
    """

    case: str
    difference: float
    same_top1: float
    apart: int = 0
    difference_apart: float = 0.0


@dataclass(frozen=True)
class Rung:
    """The result of one rung: the results of its cases and the tolerance.

    `tolerance` is None for a rung that is only reported. `skipped` is the reason why nothing was
    compared; a skipped rung has not passed. If all operators were compared one by one, `first` is
    the first operator beyond the tolerance, and its `case` is the name of the operator's value.
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
    """Return the matrix of cases for a model.

    With `full`, one case runs past the sliding window, if the model has one and it fits `context`.
    """
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
    return tuple(replace(case, calls=_truncate_calls(case.calls, context)) for case in matrix)


def _truncate_calls(calls: tuple[int, ...], context: int) -> tuple[int, ...]:
    """Return as many calls as fit the context; shorten the first if it alone does not fit."""
    sizes = [min(calls[0], context)]
    for size in calls[1:]:
        if sum(sizes) + size <= context:
            sizes.append(size)
    return tuple(sizes)


def run_case(
    stepper: Stepper, case: Case, tokens: Tensor, earlier: Tensor, *, last_only: bool = False
) -> tuple[Tensor, ExpertChoice | None]:
    """Feed the first `case.length` of `tokens` to `stepper`, in the calls of the case.

    Returns logits `[T, V]` of all tokens, or with `last_only` of the last token of each call; and
    the experts that the tokens chose, if the stepper records them.
    """
    stepper.reset()
    if case.earlier:
        stepper.step(earlier[: case.earlier])
        stepper.reset()
    logits, choices = [], []
    for piece in tokens[..., : case.length].split(list(case.calls), dim=-1):
        call_logits = stepper.step(piece)
        logits.append(call_logits[..., -1:, :] if last_only else call_logits)
        if isinstance(stepper, RecordsExpertChoice) and stepper.choice is not None:
            choices.append(stepper.choice)
    return torch.cat(logits, dim=-2), concat_choices(choices) if choices else None


@dataclass(frozen=True)
class LogitsPair:
    """Logits `[T, V]` of a model and of its reference for one case.

    `clear` is the number of tokens before the first near tie of experts that the two models decide
    differently; None if there is no such tie.
    """

    actual: Tensor
    expected: Tensor
    clear: int | None


def draw_tokens(length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return a prompt of `length` random tokens and an earlier prompt, int64, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (length + MAX_EARLIER,), generator=generator)
    return tokens[:length], tokens[length:]


def run_pair(
    stepper: Stepper,
    reference: Stepper,
    case: Case,
    tokens: Tensor,
    earlier: Tensor,
    *,
    near_tie: float = 0.0,
) -> LogitsPair:
    """Run a case on a model and on its reference.

    If `stepper` returns logits of a call's last token only, both results contain only these.
    """
    last_only = returns_last_only(stepper)
    actual, actual_choice = run_case(stepper, case, tokens, earlier, last_only=last_only)
    expected, choice = run_case(reference, case, tokens, earlier, last_only=last_only)
    clear = None
    if actual_choice is not None and choice is not None:
        change = find_changed_choice(actual_choice, choice)
        if change is not None and change[1] <= near_tie:
            num_calls = sum(end <= change[0] for end in accumulate(case.calls))
            clear = num_calls if last_only else change[0]
    return LogitsPair(actual, expected, clear)


def compare(
    number: int,
    title: str,
    stepper: Stepper,
    reference: Stepper,
    matrix: Sequence[Case],
    vocab_size: int,
    *,
    tolerance: float | None,
    near_tie: float = 0.0,
    tokens: Tensor | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Rung:
    """Run the matrix on both steppers with the same tokens (`[T]` int64; random ones by default).

    If both steppers record the chosen experts, a choice may differ if its margin is at most
    `near_tie`; the tokens from there on are compared separately. If `stepper` returns logits of a
    call's last token only, only these are compared.
    """
    prompt, earlier = draw_tokens(max(case.length for case in matrix), vocab_size)
    inputs = prompt if tokens is None else tokens
    results = []
    for index, case in enumerate(matrix):
        progress(f"case {index + 1} of {len(matrix)}: {case.name}")
        pair = run_pair(stepper, reference, case, inputs, earlier, near_tie=near_tie)
        results.append(compare_logits(case.name, pair.actual, pair.expected, pair.clear))
    return Rung(number, title, tolerance, tuple(results))


def compare_logits(
    name: str, actual: Tensor, expected: Tensor, clear: int | None = None
) -> CaseResult:
    """Compare logits `[..., V]`; a value that is not finite is an infinite difference.

    With `clear`, logits are `[T, V]`, and the tokens after the first `clear` are compared
    separately.
    """
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return CaseResult(name, float("inf"), 0.0)
    scale = max(float(expected.abs().max()), 1e-30)
    same_top1 = float((actual.argmax(-1) == expected.argmax(-1)).float().mean())
    errors = (actual - expected).abs() / scale
    if clear is None:
        return CaseResult(name, float(errors.max()), same_top1)
    worst = float(errors[:clear].max()) if clear else 0.0
    return CaseResult(name, worst, same_top1, len(errors) - clear, float(errors[clear:].max()))


def operators_rung(title: str, tolerance: float, results: Iterable[CaseResult]) -> Rung:
    """Return rung 3 for operators compared one by one, with the worst result of each `case`."""
    worst: dict[str, CaseResult] = {}
    for result in results:
        if result.case not in worst or result.difference > worst[result.case].difference:
            worst[result.case] = result
    if not worst:
        return skipped_rung(3, title, "the artifact has no n-bit operators")
    return Rung(3, title, tolerance, tuple(worst.values()))


def skipped_rung(number: int, title: str, reason: str) -> Rung:
    """Return a rung that was not run, with the reason."""
    return Rung(number, title, None, (), reason)
