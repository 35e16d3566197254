"""Reads typed values from a section of a JSON file; a bad value is an `InputError`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfmc.errors import InputError

MAX_SIZE = 1 << 24  # far beyond every model, and products stay below 2^63


class Section:
    """A section of a file such as `config.json`; errors name the file, `where`, and the key."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.file = Path(where).name

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self.raw.get(key, default)
        if value is ... or (value is None and default is not None):
            raise InputError(
                f"{self.file} has no '{key}'", where=self.where, expected=kind.__name__
            )
        if value is not None and (
            not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        ):
            raise InputError(
                f"{self.file}: '{key}' has the wrong type",
                where=self.where,
                expected=kind.__name__,
                got=repr(value),
            )
        return value

    def positive(self, key: str, default: Any = ..., maximum: int = MAX_SIZE) -> int:
        value = self.get(key, int, default)
        if value is None:
            raise InputError(f"{self.file} has no '{key}'", where=self.where, expected="int")
        if not 0 < value <= maximum:
            raise InputError(
                f"{self.file}: '{key}' is out of range",
                where=self.where,
                expected=f"1 to {maximum}",
                got=value if abs(value) <= MAX_SIZE else f"a number of {value.bit_length()} bits",
            )
        return int(value)

    def number(self, key: str, default: Any = ..., minimum: float = 0.0) -> float:
        """Return an int or a finite float, at least `minimum`, as a float."""
        value = self.raw.get(key, default)
        if value is ...:
            raise InputError(f"{self.file} has no '{key}'", where=self.where, expected="a number")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not minimum <= value <= 1e30:
            raise InputError(
                f"{self.file}: '{key}' is not a usable number",
                where=self.where,
                expected=f"a number of {minimum:g} or more",
                got=repr(value)[:80],
            )
        return float(value)

    def token_ids(self, key: str, default: int) -> tuple[int, ...]:
        """Return one token id or a list of token ids as a tuple; null is ()."""
        return read_token_ids(self.raw.get(key, default), key, self.where)

    def token_id(self, key: str, default: int) -> int | None:
        ids = self.token_ids(key, default)
        return ids[0] if ids else None


def read_token_ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    """Return token ids from a JSON value: one id, a list of ids, or null. Raise `InputError`.

    A single -1 means that there is no such token.
    """
    ids = value if isinstance(value, list) else [] if value in (None, -1) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_SIZE for i in ids):
        raise InputError(
            f"'{key}' does not contain token ids",
            where=where,
            expected="a number, a list of numbers, or null",
            got=repr(value)[:80],
        )
    return tuple(ids)
