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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lfmc.model import DecoderConfig
from lfmc.parity.expert_choices import find_changed_choice
from lfmc.run.conversation import Conversation, ConversationModel, Reply

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

    def conversation(self, tokens: Tensor, earlier: Tensor) -> Conversation:
        """Return the case with the first of `tokens`, and of `earlier` before the reset."""
        calls = tokens[: self.length].split(list(self.calls))
        return Conversation(calls, earlier[: self.earlier] if self.earlier else None)


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


def run_pairs(
    model: ConversationModel,
    reference: ConversationModel,
    conversations: Sequence[Conversation],
    *,
    near_tie: float = 0.0,
) -> list[LogitsPair]:
    """Run conversations on a model and on its reference.

    If `model` returns logits of a call's last token only, both results contain only these.
    """
    replies = model.run(conversations), reference.run(conversations)
    return [
        _pair(actual, expected, conversation, model.last_only, near_tie)
        for actual, expected, conversation in zip(*replies, conversations, strict=True)
    ]


def _pair(
    actual: Reply, expected: Reply, conversation: Conversation, last_only: bool, near_tie: float
) -> LogitsPair:
    ends = conversation.ends
    rows = [end - 1 for end in ends] if last_only else slice(None)
    clear = None
    if actual.choice is not None and expected.choice is not None:
        change = find_changed_choice(actual.choice, expected.choice)
        if change is not None and change[1] <= near_tie:
            num_calls = sum(end <= change[0] for end in ends)
            clear = num_calls if last_only else change[0]
    return LogitsPair(actual.logits, expected.logits[rows], clear)


def compare(
    number: int,
    title: str,
    model: ConversationModel,
    reference: ConversationModel,
    matrix: Sequence[Case],
    vocab_size: int,
    *,
    tolerance: float | None,
    near_tie: float = 0.0,
    tokens: Tensor | None = None,
) -> Rung:
    """Run the matrix on a model and its reference, on the same tokens.

    `tokens` are `[T]` int64, random ones by default. If both record the chosen experts, a choice
    may differ if its margin is at most `near_tie`; the tokens from there on are compared
    separately. If `model` returns logits of a call's last token only, only these are compared.
    """
    prompt, earlier = draw_tokens(max(case.length for case in matrix), vocab_size)
    inputs = prompt if tokens is None else tokens
    conversations = [case.conversation(inputs, earlier) for case in matrix]
    pairs = run_pairs(model, reference, conversations, near_tie=near_tie)
    results = [
        compare_logits(case.name, pair.actual, pair.expected, pair.clear)
        for case, pair in zip(matrix, pairs, strict=True)
    ]
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
