from __future__ import annotations

import pytest
import torch

from lfmc.calib_free.grid.distortion_curves import grid_for, measure_curves, spaced_rows
from lfmc.calib_free.grid.formats import GENERIC, Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.checkpoint.checkpoint import Checkpoint

F3, F4 = Format(3, 32, False, "float16"), Format(4, 32, False, "float16")


def test_a_few_rows_represent_the_matrix(demo: Checkpoint) -> None:
    names = [f"model.layers.2.feed_forward.experts.{i}.w{j}.weight" for i in (0, 5) for j in (1, 2)]
    weights = {name: demo.load(name).float() for name in names}
    rows = {name: weight[spaced_rows(len(weight), 24)] for name, weight in weights.items()}
    curves = measure_curves(rows, dict.fromkeys(names), [F3, F4], {F3: "clip", F4: "clip"})
    for name, weight in weights.items():
        assert curves[name][F4] < curves[name][F3]
        error = (
            quantize(weight, F3, None, "clip").dequantize() - weight
        ).square().sum() / weight.square().sum()
        assert curves[name][F3] == pytest.approx(float(error), rel=0.1)


def test_importance_weighs_the_columns() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.linspace(0, 1, 32)
    curve_error = measure_curves({"w": weight}, {"w": importance}, [F3], {F3: "clip"})["w"][F3]
    squared_error = (quantize(weight, F3, importance, "clip").dequantize() - weight).square()
    expected = (squared_error * importance).sum() / (weight.square() * importance).sum()
    assert curve_error == pytest.approx(float(expected), rel=1e-4)


def test_zeros_have_no_error() -> None:
    assert (
        measure_curves({"w": torch.zeros(2, 32)}, {"w": None}, [F3], {F3: "clip"})["w"][F3] == 0.0
    )


def test_rows_are_spread_evenly() -> None:
    assert spaced_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spaced_rows(101, 5).tolist() == [0, 25, 50, 75, 100]


def test_only_a_target_with_negative_scales_uses_them() -> None:
    symmetric = Format(4, 32, True, "float16")
    assert grid_for(symmetric, GENERIC) == "signed"
    assert grid_for(F4, GENERIC) == "clip"
