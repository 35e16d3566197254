"""Progress on stderr: bars on a terminal, otherwise a line per stage.

A command runs in stages, such as "plan" and "lower". Each stage reports steps. A step that contains
a count, such as `layer 3 of 16`, has a share and an estimate of the time left. Both come from the
count alone; a step without a count shows the elapsed time.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from lfmc.machine.memory import peak_nbytes
from lfmc.version import __version__

_COUNT = re.compile(r"(\d+) of (\d+)")


class Progress(Protocol):
    """Receives the stages of a command and their steps."""

    def expect(self, stages: int) -> None:
        """Announce how many stages follow."""

    def expect_more(self, stages: int) -> None:
        """Announce stages in addition to those that were announced."""

    def stage(self, title: str, parts: Sequence[str] = ()) -> AbstractContextManager[None]:
        """Time a stage. Stages do not overlap.

        `parts` are the beginnings of its counted steps, in order, if they are known in advance.
        """

    def step(self, detail: str) -> None:
        """Set the step of the current stage.

        `K of N` in `detail` means that the K-th of N equal parts begins, or ends if the message
        comes after the part. K may also count down from N.
        """


class Silent:
    """Prints nothing; the default of the Python API."""

    def expect(self, stages: int) -> None:
        """Do nothing."""

    def expect_more(self, stages: int) -> None:
        """Do nothing."""

    def step(self, detail: str) -> None:
        """Do nothing."""

    @contextmanager
    def stage(self, title: str, parts: Sequence[str] = ()) -> Iterator[None]:
        yield


class StepCount:
    """The counted part of a stage: parts that are done, parts in total, and the time left.

    The part that a step announces is not counted as done, so the share is never too large.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """Forget the count: a new stage begins."""
        self.done, self.total = 0, 0
        self._key: tuple[str, tuple[int, ...]] | None = None
        self._counts_down = False
        self._first_done, self._started = 0, 0.0

    def update(self, detail: str) -> None:
        """Read the count of a step. `total` is 0 if the step has no count."""
        matches = list(_COUNT.finditer(detail))
        if not matches:
            self.clear()
            return
        numbers = [int(match[1]) for match in matches]
        totals = tuple(int(match[2]) for match in matches)
        key = detail[: matches[0].start()], totals
        is_new = key != self._key
        if is_new:
            self._counts_down = numbers == list(totals) and len(numbers) == 1 and totals[0] > 1
        self._key = key
        done, total = 0, 1  # `part 2 of 3, token 5 of 96`: the last count is the fastest
        for number, size in zip(numbers, totals, strict=True):
            done = done * size + (size - number if self._counts_down else number - 1)
            total *= size
        self.done, self.total = max(0, min(done, total)), total
        if is_new:
            self._first_done, self._started = self.done, self._clock()

    @property
    def share(self) -> float:
        """The share of the current count, 0 to 1; 0 without a count."""
        return self.done / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The remaining parts times the mean time of the parts so far; None before the first."""
        finished = self.done - self._first_done
        if finished < 1:
            return None
        seconds = self._clock() - self._started
        return seconds / finished * (self.total - self.done)


class StageCount:
    """The number of the current stage, how many there are if that is known, and what is done.

    `done` is in stages. Within a stage it grows only if the parts of the stage are known.
    """

    def __init__(self) -> None:
        self.number, self.total, self.done = 0, 0, 0.0
        self._parts: tuple[str, ...] = ()

    def expect(self, stages: int) -> None:
        self.number, self.total, self.done = 0, stages, 0.0

    def expect_more(self, stages: int) -> None:
        if self.total:
            self.total += stages

    def begin(self, parts: Sequence[str] = ()) -> None:
        self._parts = tuple(parts)
        if self.total:
            self.done = float(self.number)
            self.number += 1

    def step(self, detail: str, share: float) -> None:
        """Add the share of a counted step, 0 to 1, to what is done; never subtract."""
        for index, part in enumerate(self._parts):
            if detail.startswith(part):
                share = (index + share) / len(self._parts)
                self.done = max(self.done, self.number - 1 + share)

    @property
    def is_known(self) -> bool:
        """Whether the current stage is one of the announced stages."""
        return 0 < self.number <= self.total

    def label(self, title: str) -> str:
        """Return `[3/10] title`, or the title alone for a stage that was not announced."""
        return f"[{self.number}/{self.total}] {title}" if self.is_known else title


class Lines:
    """Writes a line for each stage, with its seconds; with `verbose`, also a line for each step."""

    def __init__(self, command: str, *, verbose: bool) -> None:
        self._stages, self._verbose = StageCount(), verbose
        write_stderr(f"lfmc {__version__}: {command}")  # at once: imports take seconds

    def expect(self, stages: int) -> None:
        self._stages.expect(stages)

    def expect_more(self, stages: int) -> None:
        self._stages.expect_more(stages)

    def step(self, detail: str) -> None:
        if self._verbose:
            write_stderr(f"  {detail}")

    @contextmanager
    def stage(self, title: str, parts: Sequence[str] = ()) -> Iterator[None]:
        self._stages.begin(parts)
        with report_seconds(self._stages.label(title), write_stderr):
            yield


@contextmanager
def report_seconds(label: str, write: Callable[[str], None]) -> Iterator[None]:
    """Time the block and write a line about it, also if the block raises an exception.

    The line contains the seconds, and the peak memory of the process so far.
    """
    started, verb = time.monotonic(), "stopped after "
    try:
        yield
        verb = ""
    finally:
        peak = peak_nbytes() / 2**30
        write(f"{label}: {verb}{time.monotonic() - started:.1f} s, peak memory {peak:.2f} GiB")


def write_stderr(text: str) -> None:
    """Write a line to stderr. Nobody may read stderr any more; that does not stop a command."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        return
