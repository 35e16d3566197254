"""The exceptions of lfmc and their exit codes on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol


class Place(Protocol):
    """The first place where two models differ; see `lfmc.parity.place.Place`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the place as JSON values."""


class LfmcError(Exception):
    """An error that the user can act on: what happened, where, expected, got, and what to do.

    All parts except `what` are optional. `str(error)` writes one part per line.
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
    """A required limit is not met: parity, a budget, `--max-kl`. Exit code 3.

    `place` is the first place where the models differ, or None if it is unknown.
    """

    exit_code = 3
    place: Place | None = None

    def at(self, place: Place | None) -> GateError:
        """Set the place and return this error."""
        self.place = place
        return self


class UnsupportedError(LfmcError):
    """The target or the machine does not support the request, or a tool is missing. Exit code 4."""

    exit_code = 4


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    """Return the question "did you mean 'onnx'?" with the most similar word, or None."""
    from difflib import get_close_matches  # only an error needs it

    spellings = {known.lower(): known for known in words}
    similar = get_close_matches(word.lower(), spellings, 1)
    return f"did you mean '{spellings[similar[0]]}'?" if similar else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
