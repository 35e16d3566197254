"""Numbers that were agreed to, and what is worse than they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lfmc.check.baseline import Known, Numbers, drifted, load_baseline, save_baseline
from lfmc.check.config import Drift
from lfmc.errors import InputError

AGREED = Numbers(kl=0.1, top1=0.8, nbytes=1000, bits_per_weight=4.5)
DRIFT = Drift(kl=0.05, top1=0.01, size=0.01)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"kl": 0.1049, "top1": 0.791, "nbytes": 1010}, []),
        ({"kl": 0.01, "top1": 0.9, "nbytes": 500}, []),  # better in everything
        ({"kl": 0.1051}, ["KL went from 0.1000 to 0.1051"]),
        ({"kl": float("nan")}, ["KL went from 0.1000 to nan"]),
        ({"top1": 0.789}, ["top-1 went from 0.8000 to 0.7890"]),
        ({"nbytes": 1011}, ["size went from 1,000 to 1,011 bytes"]),
        ({"kl": None, "top1": None}, []),  # not executed here
    ],
)
def test_only_what_is_worse_by_more_than_allowed(change: dict[str, float], told: list[str]) -> None:
    found = drifted(replace(AGREED, **change), AGREED, DRIFT)
    assert len(found) == len(told)
    assert all(said.startswith(part) for said, part in zip(found, told, strict=True))


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    assert load_baseline(path) == {}
    cells = {"b": Known(AGREED, "abc"), "a": Known(replace(AGREED, kl=None), "def")}
    save_baseline(path, cells)
    assert load_baseline(path) == cells
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


@pytest.mark.parametrize("text", ["", "[]", '{"cells": {"a": {}}}', '{"cells": {"a": 3}}'])
def test_a_damaged_baseline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(InputError, match="baseline can't be read"):
        load_baseline(path)
