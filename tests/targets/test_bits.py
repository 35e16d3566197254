"""Every value of `--bits` on every target and family is planned, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.calib_free.grid.formats import Floats, parse_format
from lfmc.calib_free.make_plan import METHODS, make_plan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.roles import quantization_units
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import LfmcError
from lfmc.exporter.export import export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target, target_names

FAMILIES = ("lfm2", "lfm2_moe", "lfm3")
# MLIR compiles for a minute; the NPU targets support floats by options (tests of their folders).
EXECUTED = ("onnx", "executorch", "tvm", "coreml", pytest.param("mlir", marks=pytest.mark.slow))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", target_names())
def test_every_method_is_planned_or_refused(
    any_checkpoint: Callable[[str], Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    family: str,
) -> None:
    monkeypatch.setattr("lfmc.calib_free.auto.method.TEXTS", 8)
    checkpoint = any_checkpoint(family)
    capabilities = get_target(target).capabilities(checkpoint.config, {})
    roles = {unit.role for unit in quantization_units(checkpoint, capabilities)} - {"embedding"}
    widths = [{str(f.bits) for f in capabilities.formats(role)} for role in roles]
    supported = set.intersection(*widths)  # the embedding takes the nearest width
    for method in METHODS:
        if method.isdigit() and method not in supported:
            with pytest.raises(LfmcError, match=method):
                make_plan(checkpoint, capabilities, method, None, target=target)
            continue
        if method == "alphaq":
            continue  # needs experts, and widths that share a group size: tests/calib_free/alphaq
        plan = make_plan(checkpoint, capabilities, method, None, target=target)
        check_plan(plan, checkpoint, capabilities)
        floats = {isinstance(parse_format(row.format), Floats) for row in plan.rows}
        assert floats == ({True} if method == "none" else {True, False})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", EXECUTED)
def test_floats_are_exported(
    any_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, target: str, family: str
) -> None:
    checkpoint, backend = any_checkpoint(family), get_target(target)
    options = Options(bits="none", context=64, check="fast")
    _, report = export(checkpoint, backend, tmp_path / "b", options, force=False, progress=Silent())
    assert report.verification is not None
    assert all(rung.passed or rung.skipped for rung in report.verification.rungs)
