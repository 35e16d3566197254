"""The one exception family, and the exit code that each member means on the command line."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol


class Place(Protocol):
    """Where two models differ first (`lfmc.parity.place.Place`)."""

    def to_dict(self) -> dict[str, Any]:
        """The place as JSON values."""


class LfmcError(Exception):
    """Something a user can act on: what happened, where, what was expected and found, what to do.

    Every part but `what` is optional; `str(error)` renders the parts that are given, one a line.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        todo: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.todo = todo
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        for label, value in (
            ("where", self.where),
            ("expected", self.expected),
            ("got", self.got),
            ("to do", self.todo),
        ):
            if value is not None:
                parts.append(f"  {label + ':':<10}{value}")
        return "\n".join(parts)


class InputError(LfmcError):
    """The user's input is wrong: a path, a checkpoint, a plan, an option. Exit code 2."""

    exit_code = 2


class GateError(LfmcError):
    """A number that was promised is not met: parity, a budget, `--max-kl`. Exit code 3.

    `place` is the first place that differs, where it is known.
    """

    exit_code = 3
    place: Place | None = None

    def at(self, place: Place | None) -> GateError:
        """The same error, with its place."""
        self.place = place
        return self


class UnsupportedError(LfmcError):
    """This target or machine can't do it, or a tool is missing. Exit code 4."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
