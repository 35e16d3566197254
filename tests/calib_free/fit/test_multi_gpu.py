from __future__ import annotations

import pytest

from lfmc.calib_free.auto.sampled_text import write_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import planned_kl
from lfmc.calib_free.fit.distill import distill
from lfmc.calib_free.fit.fit import with_fitted
from lfmc.calib_free.fit.multi_gpu import distill_together
from lfmc.calib_free.fit.training_loop import Course, Terms
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from lfmc.errors import InputError
from tests.calib_free.conftest import MakeCheckpoint

COURSE = Course(steps=12, batch=4)


def test_two_processes_learn_what_one_learns(make_checkpoint: MakeCheckpoint) -> None:
    pytest.importorskip("accelerate")
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "2", None)
    texts = write_texts(StreamedDecoder(checkpoint), 24, 24, 1, lambda message: None)
    told: list[str] = []
    pair = distill_together(checkpoint, plan, texts[:16], Terms(0, told.append), COURSE, 2)
    single = distill(checkpoint, plan, texts[:16], Terms(0, lambda m: None), COURSE)
    assert set(pair) == set(single)
    assert any(line.startswith("end to end: step 12 of 12") for line in told)
    kls = [
        planned_kl(checkpoint, with_fitted(plan, made, "so"), texts[16:]) for made in (pair, single)
    ]
    assert kls[0] == pytest.approx(kls[1], rel=0.02)
    assert kls[0] < 0.98 * planned_kl(checkpoint, plan, texts[16:])


def test_a_fault_in_a_process_comes_back(make_checkpoint: MakeCheckpoint) -> None:
    pytest.importorskip("accelerate")
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "2", None)
    texts = write_texts(StreamedDecoder(checkpoint), 4, 8, 1, lambda message: None)
    gone = checkpoint.path / "config.json"
    gone.unlink()
    with pytest.raises(Exception, match=InputError.__name__):
        distill_together(checkpoint, plan, texts, Terms(0, lambda m: None), COURSE, 2)
