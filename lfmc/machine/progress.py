"""Progress on stderr: a spinner for people, silence for pipes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told what is being done; `step` is a detail of the stage that is open."""

    def step(self, detail: str) -> None: ...

    def stage(self, title: str) -> AbstractContextManager[None]: ...


class Silent:
    """Shows nothing: the default of the Python API."""

    def step(self, detail: str) -> None:
        """Do nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        yield


class Spinner:
    """One line that moves while a stage runs, and stays, with its seconds, if it took over two."""

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


def for_terminal() -> Silent | Spinner:
    """A spinner where stderr is a terminal, else nothing."""
    return Spinner() if sys.stderr.isatty() else Silent()
