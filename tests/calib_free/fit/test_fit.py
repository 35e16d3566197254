from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.fit import fit
from lfmc.calib_free.fit import training_loop as training
from lfmc.calib_free.fit.blockwise import block_nbytes
from lfmc.calib_free.fit.fit import Effort, FitRecipe, fit_plan
from lfmc.calib_free.fit.training_loop import TrainingSchedule
from lfmc.calib_free.grid.formats import GENERIC, Capabilities, Format
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.planned_tensors import quantize_tensor, stored_error
from lfmc.errors import InputError, UnsupportedError
from tests.calib_free.conftest import MakeCheckpoint

SHORT = FitRecipe(16, 24, TrainingSchedule(20, 4), TrainingSchedule(20, 4))
BEST = Effort("best")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("most",), "no such effort"),
        (("best", 0.0), "positive"),
        (("best", float("nan")), "positive"),
        (("fast", 3.0), "minutes limit"),
        (("best", None, "tpu"), "no such device"),
        (("max", None, "cpu", 2), "number of GPUs"),
        (("max", None, "cuda", 3), "number of GPUs"),
    ],
)
def test_invalid_efforts_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Effort(*arguments)  # type: ignore[arg-type]


def test_fitting_keeps_formats_and_bytes(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.RECIPES, "best", SHORT)
    checkpoint, budget = make_checkpoint("lfm2_moe"), Budget(5.0)
    unfitted = make_plan(checkpoint, GENERIC, "auto", budget)
    fitted = make_plan(checkpoint, GENERIC, "auto", budget, effort=BEST)
    check_plan(fitted, checkpoint, GENERIC)
    assert fitted.effort == "best"
    assert fitted.nbytes == unfitted.nbytes
    assert len(fitted.fitted_names) > 20
    assert [(r.name, r.format, r.nbytes) for r in fitted.rows] == [
        (r.name, r.format, r.nbytes) for r in unfitted.rows
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
    monkeypatch.setitem(fit.RECIPES, "best", SHORT)
    tables = (Format(2, 0, True, "float16"),)
    capabilities = Capabilities(tables, tables, tables, ("float32",))
    checkpoint = make_checkpoint("lfm2_moe")
    messages: list[str] = []
    fitted = make_plan(checkpoint, capabilities, "2", None, effort=BEST, progress=messages.append)
    check_plan(fitted, checkpoint, capabilities)
    palette_rows = [row for row in fitted.rows if row.format == "lut2-float16"]
    assert palette_rows
    assert all(row.grid == "fitted" for row in palette_rows)
    kls = [float(line.split(": ")[-1]) for line in messages if line.startswith("KL")]
    assert kls[-1] < kls[0]


def test_a_fit_that_raises_the_kl_is_discarded(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.RECIPES, "best", SHORT)
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "4", None)
    kls = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(fit, "planned_kl", lambda *arguments: next(kls))
    messages: list[str] = []
    fitted = fit_plan(checkpoint, plan, BEST, messages.append)
    assert fitted == replace(plan, predicted_kl=0.1)
    assert [line.split(": ")[-1] for line in messages if line.startswith("KL")] == [
        "0.1000",
        "0.2000",
        "0.3000",
    ]


def test_a_model_too_large_for_end_to_end_training_is_fitted_block_by_block(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fit.RECIPES, "best", SHORT)
    checkpoint = make_checkpoint("lfm2")
    memory = block_nbytes(checkpoint, SHORT.texts * SHORT.length)
    monkeypatch.setattr(fit, "installed_nbytes", lambda device: memory)
    messages: list[str] = []
    fitted = fit_plan(checkpoint, make_plan(checkpoint, GENERIC, "2", None), BEST, messages.append)
    assert fitted.fitted_names
    assert not any("end to end" in line for line in messages)
    reasons = {row.reason for row in fitted.rows if row.digest is not None}
    assert all(reason.endswith("then fitted block by block") for reason in reasons)


def test_an_interrupted_max_resumes(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setitem(fit.RECIPES, "max", replace(SHORT, blockwise=None))
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "2", None)

    def stop(message: str) -> None:
        if "step 9 " in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_plan(checkpoint, plan, Effort("max"), stop)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    messages: list[str] = []
    resumed = fit_plan(checkpoint, plan, Effort("max"), messages.append)
    assert next(m for m in messages if "end to end" in m).startswith("end to end: step 9 of 20")
    assert not list((tmp_path / "cache").iterdir())
    assert resumed == fit_plan(checkpoint, plan, Effort("max"), messages.append)


def test_impossible_efforts_are_refused_before_any_work(
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
