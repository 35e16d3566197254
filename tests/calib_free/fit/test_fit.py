from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.fit import fit
from lfmc.calib_free.fit import training_loop as training
from lfmc.calib_free.fit.blockwise import block_nbytes
from lfmc.calib_free.fit.fit import Effort, Work, fit_plan
from lfmc.calib_free.fit.training_loop import Course
from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Format
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.planned_tensors import quantize_tensor, stored_error
from lfmc.errors import InputError, UnsupportedError
from tests.calib_free.conftest import MakeCheckpoint

SHORT = Work(16, 24, Course(20, 4), Course(20, 4))
BEST = Effort("best")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("most",), "no such effort"),
        (("best", 0.0), "positive"),
        (("best", float("nan")), "positive"),
        (("fast", 3.0), "no fitting"),
        (("best", None, "tpu"), "no such device"),
        (("max", None, "cpu", 2), "number of GPUs"),
        (("max", None, "cuda", 3), "number of GPUs"),
    ],
)
def test_efforts_that_make_no_sense(arguments: tuple[object, ...], what: str) -> None:
    with pytest.raises(InputError, match=what):
        Effort(*arguments)  # type: ignore[arg-type]


def test_fitting_keeps_formats_and_bytes(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.WORK, "best", SHORT)
    checkpoint, budget = make_checkpoint("lfm2_moe"), Budget(5.0)
    plain = make_plan(checkpoint, GENERIC, "auto", budget)
    fitted = make_plan(checkpoint, GENERIC, "auto", budget, effort=BEST)
    check_plan(fitted, checkpoint, GENERIC)
    assert fitted.effort == "best"
    assert fitted.nbytes == plain.nbytes
    assert len(fitted.fitted_names) > 20
    assert [(r.name, r.format, r.nbytes) for r in fitted.rows] == [
        (r.name, r.format, r.nbytes) for r in plain.rows
    ]
    for row in fitted.rows:
        assert (row.digest is not None) == (row.name in fitted.fitted) == (row.grid == "fitted")
        if row.digest is not None and row.format.startswith("int"):
            packed = quantize_tensor(checkpoint, fitted, row.name)
            error = stored_error(checkpoint, fitted, row.name, packed)
            assert row.error == pytest.approx(error, rel=1e-4)


def test_tables_of_palettes_are_fitted(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.WORK, "best", SHORT)
    tables = (Format(2, 0, True, "float16"),)
    capabilities = Capabilities(tables, tables, tables, ("float32",))
    checkpoint = make_checkpoint("lfm2_moe")
    told: list[str] = []
    fitted = make_plan(checkpoint, capabilities, "2", None, effort=BEST, progress=told.append)
    check_plan(fitted, checkpoint, capabilities)
    learned = [row for row in fitted.rows if row.format == "lut2-float16"]
    assert learned
    assert all(row.grid == "fitted" for row in learned)
    kls = [float(line.split(": ")[-1]) for line in told if line.startswith("KL")]
    assert kls[-1] < kls[0]


def test_a_fit_that_does_not_help_is_not_kept(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.WORK, "best", SHORT)
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "4", None)
    found = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(fit, "planned_kl", lambda *arguments: next(found))
    told: list[str] = []
    kept = fit_plan(checkpoint, plan, BEST, told.append)
    assert kept == replace(plan, predicted_kl=0.1)
    assert [line.split(": ")[-1] for line in told if line.startswith("KL")] == [
        "0.1000",
        "0.2000",
        "0.3000",
    ]


def test_a_model_too_large_to_learn_as_a_whole_learns_block_by_block(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.WORK, "best", SHORT)
    checkpoint = make_checkpoint("lfm2")
    memory = block_nbytes(checkpoint, SHORT.texts * SHORT.length)
    monkeypatch.setattr(fit, "installed_nbytes", lambda device: memory)
    told: list[str] = []
    fitted = fit_plan(checkpoint, make_plan(checkpoint, GENERIC, "2", None), BEST, told.append)
    assert fitted.fitted_names
    assert not any("end to end" in line for line in told)
    reasons = {row.reason for row in fitted.rows if row.digest is not None}
    assert all(reason.endswith("then fitted block by block") for reason in reasons)


def test_max_goes_on_where_it_was_stopped(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setitem(fit.WORK, "max", replace(SHORT, blocks=None))
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "2", None)

    def stop(message: str) -> None:
        if "step 9 " in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_plan(checkpoint, plan, Effort("max"), stop)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    told: list[str] = []
    resumed = fit_plan(checkpoint, plan, Effort("max"), told.append)
    assert next(m for m in told if "end to end" in m).startswith("end to end: step 9 of 20")
    assert not list((tmp_path / "cache").iterdir())
    assert resumed == fit_plan(checkpoint, plan, Effort("max"), told.append)


def test_what_can_not_be_fitted_is_said_first(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("lfm2")
    with pytest.raises(InputError, match="nothing to fit"):
        make_plan(checkpoint, GENERIC, "none", None, effort=BEST)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for level in ("fast", "max"):
        with pytest.raises(UnsupportedError, match="CUDA"):
            make_plan(checkpoint, GENERIC, "4", None, effort=Effort(level, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="nothing to do on a GPU"):
        make_plan(checkpoint, GENERIC, "4", None, effort=Effort(device="cuda"))
