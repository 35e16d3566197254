"""Budgets are spent, and never exceeded, even if the estimated size of the graph is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfmc.calib_free.grid.formats import Capabilities, Format
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import GateError, InputError
from lfmc.exporter import budget
from lfmc.exporter.budget import UNSPENT, LoweredPlan, lower_within_budget
from lfmc.graph.stored_codes import StoredCodes
from lfmc.lowering.request import Options, make_request
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target
from lfmc.targets.onnx.target import OnnxTarget


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint("lfm2_moe", num_experts=8, vocab_size=512))


@pytest.fixture
def lower(checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., LoweredPlan]:
    """Return `lower(**options)`, which plans and lowers the checkpoint within a budget."""

    def run(**options: Any) -> LoweredPlan:
        target, settings = get_target("onnx"), Options(context=64, **options)
        request = make_request(checkpoint, target, settings)
        return lower_within_budget(
            checkpoint, target, request, settings, tmp_path, Silent(), StoredCodes()
        )

    return run


def estimate_graph(patch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Let the ONNX target estimate this number of bytes for the graph."""
    capabilities = OnnxTarget.capabilities

    def with_estimate(self: OnnxTarget, config: Any, options: Any) -> Capabilities:
        return replace(capabilities(self, config, options), graph_nbytes=nbytes)

    patch.setattr(OnnxTarget, "capabilities", with_estimate)


@pytest.mark.parametrize("estimate", [0, 150_000])
def test_a_wrong_estimate_is_replaced_by_the_measured_size(
    lower: Callable[..., LoweredPlan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    estimate: int,
) -> None:
    estimate_graph(monkeypatch, estimate)
    monkeypatch.setattr("lfmc.calib_free.auto.method.TEXTS", 8)
    lowered = lower(budget=Budget(9.0))
    limit = lowered.plan.limit_nbytes
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert files == lowered.nbytes == lowered.plan.nbytes
    assert limit is not None
    assert (1 - UNSPENT) * limit <= files <= limit


def test_a_plan_file_that_is_larger_than_its_budget_is_refused(
    lower: Callable[..., LoweredPlan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Checkpoint,
) -> None:
    estimate_graph(monkeypatch, 0)
    plan = make_plan(checkpoint, get_target("onnx").capabilities(checkpoint.config, {}), "8", None)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    replace(plan, limit_nbytes=plan.nbytes).save(path)
    with pytest.raises(GateError, match="larger than its budget"):
        lower(plan=path)


def test_without_a_budget_a_plan_has_the_default_or_the_smallest_size(
    checkpoint: Checkpoint,
) -> None:
    capabilities = get_target("onnx").capabilities(checkpoint.config, {})
    small = make_plan(checkpoint, replace(capabilities, graph_nbytes=0), "uniform", None)
    assert small.limit_nbytes == int(4.5 * checkpoint.num_params / 8)
    large = make_plan(checkpoint, replace(capabilities, graph_nbytes=1_000_000), "uniform", None)
    assert large.limit_nbytes == large.nbytes > 1_000_000
    with pytest.raises(InputError, match="below the smallest possible size"):
        make_plan(checkpoint, replace(capabilities, graph_nbytes=1_000_000), "auto", Budget(4.5))


def test_files_with_other_bytes_than_the_plan_are_refused() -> None:
    checkpoint = open_checkpoint()
    padded = Format(4, 96, False, "float16")  # 3 groups of 256 columns
    plan = make_plan(checkpoint, get_target("onnx").capabilities(checkpoint.config, {}), "4", None)
    rows = [
        replace(row, format=padded.name, nbytes=padded.nbytes(row.shape))
        for row in plan.rows
        if row.role == "expert"
    ]
    plan = replace(plan, rows=tuple(rows), limit_nbytes=None)
    planned = sum(row.nbytes for row in rows)
    dense = planned - sum(padded.padding_nbytes(row.shape) for row in rows)
    assert dense < planned - len(rows)
    budget._check_stored(plan, planned)
    budget._check_stored(plan, dense)
    for wrong in (planned + 1, planned - 1, dense + 1, dense - len(rows) - 1):
        with pytest.raises(GateError, match="does not contain the planned number"):
            budget._check_stored(plan, wrong)
