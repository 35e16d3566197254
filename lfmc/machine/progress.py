"""Progress on stderr: a spinner if stderr is a terminal, otherwise nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a command; `step` sets a detail of the current stage."""

    def step(self, detail: str) -> None: ...

    def stage(self, title: str) -> AbstractContextManager[None]: ...


class Silent:
    """Prints nothing; the default of the Python API."""

    def step(self, detail: str) -> None:
        """Do nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        yield


class Spinner:
    """Shows a spinner during a stage; prints stages that took longer than 2 s, with their time."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._status = self._console.status("")
        self._title = ""

    def step(self, detail: str) -> None:
        self._status.update(f"{self._title}: {detail}")

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        self._title = title
        started = time.monotonic()
        self._status.update(title)
        with self._status:
            yield
        seconds = time.monotonic() - started
        if seconds > 2:
            self._console.print(f"{title} ({seconds:.0f} s)", style="dim", markup=False)


def terminal_progress() -> Silent | Spinner:
    """Return a spinner if stderr is a terminal, otherwise `Silent`."""
    return Spinner() if sys.stderr.isatty() else Silent()
