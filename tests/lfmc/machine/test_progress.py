"""Counts, shares and times left of stages; lines on stderr."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.exporter.budget import AUTO_PARTS, plan_for
from lfmc.lowering.request import Options
from lfmc.machine.progress import Lines, Silent, StageCount, StepCount
from lfmc.machine.progress_bars import clock_time
from lfmc.targets.base import get_target

COST = r"\d+\.\d s, peak memory \d+\.\d\d GiB"


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_count_begins_at_nothing_and_never_exceeds_what_is_done() -> None:
    count = StepCount(Clock())
    shares = []
    for layer in range(1, 5):
        count.update(f"forward, layer {layer} of 4")
        shares.append(count.share)
    assert shares == [0.0, 0.25, 0.5, 0.75]


def test_a_count_may_run_down() -> None:
    count = StepCount(Clock())
    for layer in (4, 3, 2, 1):
        count.update(f"backward, layer {layer} of 4")
        assert count.done == 4 - layer


def test_nested_counts_multiply() -> None:
    count = StepCount(Clock())
    count.update("text: part 2 of 3, token 5 of 10")
    assert (count.done, count.total) == (14, 30)


def test_the_time_left_is_the_mean_of_the_parts_so_far() -> None:
    clock = Clock()
    count = StepCount(clock)
    count.update("tensor 1 of 10")
    assert count.seconds_left is None  # nothing is measured yet
    clock.now += 3
    count.update("tensor 2 of 10")
    assert count.seconds_left == pytest.approx(27)
    clock.now += 1
    count.update("tensor 3 of 10")
    assert count.seconds_left == pytest.approx(16)


def test_a_training_that_is_resumed_does_not_count_what_it_skipped() -> None:
    clock = Clock()
    count = StepCount(clock)
    count.update("fit: step 81 of 101, loss 0.5")
    clock.now += 2
    count.update("fit: step 82 of 101, loss 0.4")
    assert count.seconds_left == pytest.approx(40)


def test_other_words_or_totals_are_another_count() -> None:
    clock = Clock()
    count = StepCount(clock)
    count.update("forward, layer 1 of 4")
    clock.now += 9
    count.update("backward, layer 4 of 4")
    assert (count.done, count.seconds_left) == (0, None)


def test_a_step_without_a_count_has_no_share() -> None:
    count = StepCount(Clock())
    count.update("layer 3 of 4")
    count.update("choosing formats")
    assert (count.total, count.share, count.seconds_left) == (0, 0.0, None)


def test_stages_are_numbered_only_if_they_were_announced() -> None:
    stages = StageCount()
    stages.begin()
    assert stages.label("load") == "load"
    stages.expect(2)
    labels = []
    for title in ("plan", "lower", "trace"):
        stages.begin()
        labels.append(stages.label(title))
    assert labels == ["[1/2] plan", "[2/2] lower", "trace"]


def test_what_is_done_grows_over_the_parts_of_a_stage_and_never_shrinks() -> None:
    stages, count = StageCount(), StepCount(Clock())
    stages.expect(2)
    stages.begin(("forward", "backward"))
    done = []
    for detail in (
        "forward 1 of 2",
        "forward 2 of 2",
        "head",
        "backward 2 of 2",
        "backward 1 of 2",
    ):
        count.update(detail)
        stages.step(detail, count.share)
        done.append(stages.done)
    assert done == [0.0, 0.25, 0.25, 0.5, 0.75]
    stages.step("forward 1 of 2", 0.0)
    assert stages.done == 0.75
    stages.begin()  # a stage without parts counts when it ends
    stages.step("forward 2 of 2", 0.5)
    assert stages.done == 1.0


def test_the_parts_of_auto_are_steps_of_a_plan(
    tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("lfm2"))
    progress = Lines("plan", verbose=True)
    plan_for(checkpoint, get_target("onnx"), Options(cache=False), progress)
    steps = [line.strip() for line in capsys.readouterr().err.splitlines()]
    first = [next(i for i, s in enumerate(steps) if s.startswith(part)) for part in AUTO_PARTS]
    assert first == sorted(first)
    counted = [step for step in steps if re.search(r"\d+ of \d+", step)]
    assert all(step.startswith(AUTO_PARTS) for step in counted)


def test_lines_have_the_seconds_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Lines("export", verbose=False)
    assert re.fullmatch(r"lfmc \S+: export\n", capsys.readouterr().err)  # before any work
    progress.expect(1)
    with progress.stage("plan"):
        progress.step("layer 1 of 2")
    assert re.fullmatch(rf"\[1/1\] plan: {COST}\n", capsys.readouterr().err)


def test_a_stage_that_fails_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Lines("export", verbose=False)
    with pytest.raises(ValueError, match="wrong"), progress.stage("plan"):
        raise ValueError("wrong")
    assert re.search(rf"^plan: stopped after {COST}$", capsys.readouterr().err, re.M)


def test_verbose_lines_contain_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Lines("export", verbose=True)
    with progress.stage("plan"):
        progress.step("layer 1 of 2")
    assert "\n  layer 1 of 2\n" in capsys.readouterr().err


def test_silent_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Silent()
    progress.expect(1)
    with progress.stage("plan"):
        progress.step("layer 1 of 2")
    assert capsys.readouterr() == ("", "")


def test_clock_times() -> None:
    assert [clock_time(s) for s in (5, 65, 7265)] == ["0:05", "1:05", "2:01:05"]
