"""Progress on a terminal: a bar of the stages above a bar of the current step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from lfmc.machine.progress import StageCount, StepCount, report_seconds

BAR_LENGTH, SHORT_BAR_LENGTH = 16, 8  # columns; short on a terminal below WIDE columns
WIDE = 80


def is_dumb_terminal() -> bool:
    """Return whether the terminal can't move its cursor (TERM=dumb)."""
    return Console(file=sys.stderr).is_dumb_terminal


def clock_time(seconds: float) -> str:
    """Return `1:05` or `2:01:05`."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Bars:
    """Shows bars while a stage runs; writes a line with its seconds when the stage ends.

    The upper bar is the share of the stages, which differ in length; it moves within a stage whose
    parts are known. The lower bar and the time left are those of the current step, if it has a
    count.
    """

    def __init__(self, command: str, *, verbose: bool) -> None:
        # The file is passed, because some libraries replace sys.stderr while they run.
        self._console = Console(file=sys.stderr, highlight=False, markup=False)
        self._command, self._verbose = command, verbose
        self._stages, self._count = StageCount(), StepCount()
        self._started = time.monotonic()
        self._bars: Progress | None = None
        self._title = ""

    def expect(self, stages: int) -> None:
        self._stages.expect(stages)

    def expect_more(self, stages: int) -> None:
        self._stages.expect_more(stages)

    def step(self, detail: str) -> None:
        self._count.update(detail)
        self._stages.step(detail, self._count.share)
        self._show(f"{self._title}: {detail}")
        if self._verbose:
            self._console.print(f"  {detail}", style="dim")

    @contextmanager
    def stage(self, title: str, parts: Sequence[str] = ()) -> Iterator[None]:
        self._stages.begin(parts)
        self._count.clear()
        self._title, stage_started = title, time.monotonic()
        with report_seconds(self._stages.label(title), self._print):
            bars = Progress(
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                BarColumn(BAR_LENGTH if self._console.width >= WIDE else SHORT_BAR_LENGTH),
                _ShareColumn(),
                _TimeColumn(self._count),
                console=self._console,
                transient=True,
                expand=True,
                redirect_stdout=False,
            )
            self._overall = bars.add_task(self._command, started=self._started, total=None)
            self._current = bars.add_task(title, started=stage_started, total=None)
            self._bars = bars
            self._show(title)
            try:
                with bars:
                    yield
            finally:
                self._bars = None

    def _show(self, description: str) -> None:
        bars, count, stages = self._bars, self._count, self._stages
        if bars is None:
            return
        bars.update(self._current, description=description, completed=count.done)
        bars.tasks[1].total = count.total or None
        if stages.is_known:
            label = f"{self._command}, stage {stages.number} of {stages.total}"
            total = stages.total
            bars.update(self._overall, description=label, completed=stages.done, total=total)

    def _print(self, text: str) -> None:
        self._console.print(text, style="dim")


class _ShareColumn(ProgressColumn):
    """The share in per cent, if the task has a count."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{100 * task.completed / task.total:3.0f} %")


class _TimeColumn(ProgressColumn):
    """The elapsed time; of the lower bar, the time left if that can be estimated."""

    def __init__(self, count: StepCount) -> None:
        super().__init__(table_column=Column(no_wrap=True, justify="right"))
        self._count = count

    def render(self, task: Task) -> Text:
        left = self._count.seconds_left if task.id else None
        if left is not None:
            return Text(f"{clock_time(left)} left")
        return Text(clock_time(time.monotonic() - task.fields["started"]))
