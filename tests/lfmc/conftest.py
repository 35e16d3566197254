"""Fixtures of this folder: a verified export, and facts about plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lfmc.bundle.bundle import Bundle, open_bundle
from lfmc.calib_free.auto.method import Allocation
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.exporter.budget import plan_for
from lfmc.exporter.export import Report, export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.report.plan_facts import PlanFacts, gather_plan
from lfmc.targets.base import get_target
from tests.run_cache import RunCache


@pytest.fixture(scope="session")
def exported(run_cache: RunCache) -> tuple[Bundle, Report]:
    """`--bits uniform` of the bundled checkpoint with the full check; do not change its folder."""
    options = Options(bits="uniform", context=200)
    checkpoint, target = open_checkpoint(), get_target("onnx")

    def write(folder: Path) -> Report:
        output = folder / "bundle"
        return export(checkpoint, target, output, options, force=False, progress=Silent())[1]

    folder, report = run_cache.make_once(("export", checkpoint.fingerprint, options), write)
    return open_bundle(folder / "bundle"), report


@pytest.fixture
def bundle_path(exported: tuple[Bundle, Report]) -> Path:
    return exported[0].path


@pytest.fixture(scope="session")
def plan_facts(any_checkpoint: Callable[[str], Checkpoint]) -> Callable[[str, str], PlanFacts]:
    """Return `plan_facts(name, bits)`: cached facts about the ONNX plan of a checkpoint."""

    @cache
    def gather(name: str, bits: str) -> PlanFacts:
        checkpoint, target = any_checkpoint(name), get_target("onnx")
        allocations = list[Allocation]()
        plan = plan_for(checkpoint, target, Options(bits=bits), Silent(), allocations.append)
        capabilities = target.capabilities(checkpoint.config)
        matrix_costs = allocations[0].matrix_costs if allocations else None
        return gather_plan(checkpoint, capabilities, plan, matrix_costs, lambda message: None)

    return gather
