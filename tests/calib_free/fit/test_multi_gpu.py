from __future__ import annotations

import pytest

from lfmc.calib_free.auto.sampled_text import sample_texts
from lfmc.calib_free.auto.streamed_decoder import StreamedDecoder
from lfmc.calib_free.fit.blocks import planned_kl
from lfmc.calib_free.fit.distill import distill
from lfmc.calib_free.fit.fit import with_fitted
from lfmc.calib_free.fit.multi_gpu import distill_multi_process
from lfmc.calib_free.fit.training_loop import TrainingOptions, TrainingSchedule
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from lfmc.errors import InputError
from tests.calib_free.conftest import MakeCheckpoint

SCHEDULE = TrainingSchedule(steps=12, batch=4)


def test_two_processes_match_one(make_checkpoint: MakeCheckpoint) -> None:
    pytest.importorskip("accelerate")
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "2", None)
    texts = sample_texts(StreamedDecoder(checkpoint), 24, 24, 1, lambda message: None)
    messages: list[str] = []
    options = TrainingOptions(0, messages.append)
    pair = distill_multi_process(checkpoint, plan, texts[:16], options, SCHEDULE, 2)
    quiet = TrainingOptions(0, lambda message: None)
    single = distill(checkpoint, plan, texts[:16], quiet, SCHEDULE)
    assert set(pair) == set(single)
    assert any(line.startswith("end to end: step 12 of 12") for line in messages)
    kls = [
        planned_kl(checkpoint, with_fitted(plan, fitted, "here"), texts[16:])
        for fitted in (pair, single)
    ]
    assert kls[0] == pytest.approx(kls[1], rel=0.02)
    assert kls[0] < 0.98 * planned_kl(checkpoint, plan, texts[16:])


def test_an_error_in_a_process_is_raised(make_checkpoint: MakeCheckpoint) -> None:
    pytest.importorskip("accelerate")
    checkpoint = make_checkpoint("lfm2")
    plan = make_plan(checkpoint, GENERIC, "2", None)
    texts = sample_texts(StreamedDecoder(checkpoint), 4, 8, 1, lambda message: None)
    (checkpoint.path / "model.safetensors").unlink()
    options = TrainingOptions(0, lambda message: None)
    with pytest.raises(Exception, match=InputError.__name__):
        distill_multi_process(checkpoint, plan, texts, options, SCHEDULE, 2)
