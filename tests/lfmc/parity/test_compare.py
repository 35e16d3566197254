"""The comparison of logits must detect differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lfmc.errors import GateError
from lfmc.model import read_config
from lfmc.parity.compare import CaseResult, Rung, cases, compare, compare_logits, skipped_rung
from lfmc.run.conversation import SteppedModel
from lfmc.verification.rungs import Verification
from tests.factories import KINDS

CONFIG = read_config(KINDS["lfm3"])


class Echo:
    """A model whose logits depend on the token and on its position."""

    context = 4096

    def __init__(self, resets: bool = True, drift: float = 0.0) -> None:
        self.resets, self.drift, self.length = resets, drift, 0

    def reset(self) -> None:
        if self.resets:
            self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        logits = torch.stack([tokens.float(), positions.float()], dim=-1)
        return logits * (1 + self.drift * (positions >= 20).float().unsqueeze(-1))


@pytest.mark.parametrize("context", [1, 2, 5, 9, 30, 4096])
def test_every_case_fits_its_context(context: int) -> None:
    for full in (True, False):
        for case in cases(CONFIG, context, full=full):
            assert 1 <= case.length <= context
            assert all(size >= 1 for size in case.calls)


def test_one_case_runs_past_the_sliding_window() -> None:
    window_cases = [c for c in cases(CONFIG, 4096, full=True) if "window" in c.name]
    assert window_cases
    assert window_cases[0].length > CONFIG.sliding_window
    assert not [
        c for c in cases(replace(CONFIG, sliding_window=0), 64, full=True) if "window" in c.name
    ]


def run(actual: Echo, tolerance: float) -> Rung:
    matrix = cases(CONFIG, 64, full=True)
    models = SteppedModel(actual), SteppedModel(Echo())
    return compare(3, "echo", *models, matrix, 100, tolerance=tolerance)


def test_equal_models_pass() -> None:
    rung = run(Echo(), 0.0)
    assert rung.passed
    assert rung.worst == 0.0
    assert [c.case for c in rung.cases] == [c.name for c in cases(CONFIG, 64, full=True)]


def test_a_state_that_survives_a_reset_fails() -> None:
    rung = run(Echo(resets=False), 1e-5)
    assert not rung.passed


def test_a_difference_late_in_the_prompt_fails() -> None:
    rung = run(Echo(drift=1e-3), 1e-4)
    assert not rung.passed
    assert Verification((rung,), None)
    with pytest.raises(GateError, match="parity rung 3 failed") as excinfo:
        Verification((rung,), None).require()
    assert excinfo.value.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_differs_infinitely(value: float) -> None:
    logits = torch.ones(3, 4)
    actual = logits.clone()
    actual[1, 2] = value
    assert compare_logits("x", actual, logits).difference == float("inf")


def test_another_shape_differs_infinitely() -> None:
    assert compare_logits("x", torch.ones(3, 4), torch.ones(2, 4)).difference == float("inf")


def test_a_skipped_rung_neither_passes_nor_raises() -> None:
    rung = skipped_rung(1, "decoder", "transformers is not installed")
    assert not rung.passed
    Verification((rung,), None).require()


def test_a_rung_without_a_tolerance_only_reports() -> None:
    assert Rung(3, "shipped", None, (CaseResult("one shot", 0.4, 0.5),)).passed
