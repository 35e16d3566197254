"""The baseline: regressions against it, and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lfmc.check.baseline import (
    BaselineCell,
    Numbers,
    find_regressions,
    load_baseline,
    save_baseline,
)
from lfmc.check.config import Drift
from lfmc.errors import InputError

BASELINE = Numbers(kl=0.1, top1=0.8, nbytes=1000, bits_per_weight=4.5)
DRIFT = Drift(kl=0.05, top1=0.01, size=0.01)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({}, []),
        ({"kl": 0.1049, "top1": 0.791, "nbytes": 1010}, []),
        ({"kl": 0.01, "top1": 0.9, "nbytes": 500}, []),  # every number is better
        ({"kl": 0.1051}, ["KL went from 0.1000 to 0.1051"]),
        ({"kl": float("nan")}, ["KL went from 0.1000 to nan"]),
        ({"top1": 0.789}, ["top-1 went from 0.8000 to 0.7890"]),
        ({"nbytes": 1011}, ["size went from 1,000 to 1,011 bytes"]),
        ({"kl": None, "top1": None}, []),  # not executed
    ],
)
def test_only_changes_beyond_the_drift_are_regressions(
    change: dict[str, float], messages: list[str]
) -> None:
    regressions = find_regressions(replace(BASELINE, **change), BASELINE, DRIFT)
    assert len(regressions) == len(messages)
    assert all(map(str.startswith, regressions, messages))


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    assert load_baseline(path) == {}
    cells = {
        "b": BaselineCell(BASELINE, "abc"),
        "a": BaselineCell(replace(BASELINE, kl=None), "def"),
    }
    save_baseline(path, cells)
    assert load_baseline(path) == cells
    assert path.read_text().index('"a"') < path.read_text().index('"b"')


@pytest.mark.parametrize("text", ["", "[]", '{"cells": {"a": {}}}', '{"cells": {"a": 3}}'])
def test_a_damaged_baseline_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(InputError, match="baseline can't be read"):
        load_baseline(path)
