"""What several tests of this folder share: a verified export, and facts about plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lfmc.bundle.bundle import Bundle
from lfmc.calib_free.auto.method import Allocation
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.exporter.export import Report, export, plan_for
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.report.plan_facts import PlanFacts, gather_plan
from lfmc.targets.base import get_target


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Report]:
    """`--bits uniform` with the full check; its folder must not be changed."""
    output = tmp_path_factory.mktemp("export") / "bundle"
    options = Options(bits="uniform", context=200)
    checkpoint, target = open_checkpoint(), get_target("onnx")
    return export(checkpoint, target, output, options, force=False, progress=Silent())


@pytest.fixture
def bundle_path(exported: tuple[Bundle, Report]) -> Path:
    return exported[0].path


@pytest.fixture(scope="session")
def plan_facts(any_checkpoint: Callable[[str], Checkpoint]) -> Callable[[str, str], PlanFacts]:
    """`plan_facts(name, bits)`: facts about the ONNX plan of a checkpoint, gathered once."""

    @cache
    def gather(name: str, bits: str) -> PlanFacts:
        checkpoint, target, seen = any_checkpoint(name), get_target("onnx"), list[Allocation]()
        plan = plan_for(checkpoint, target, Options(bits=bits), Silent(), seen.append)
        capabilities = target.capabilities(checkpoint.config)
        measured = seen[0].measured if seen else None
        return gather_plan(checkpoint, capabilities, plan, measured, lambda message: None)

    return gather
