"""Codes on disk: written once, read by the next export, and removed."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint, demo_path, open_checkpoint
from lfmc.graph import planned_weights, stored_codes
from lfmc.graph.planned_weights import PlannedWeights
from lfmc.graph.stored_codes import StoredCodes, open_codes, remove_old_codes
from lfmc.targets.base import get_target

NAME = "model.layers.0.feed_forward.w1.weight"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(demo_path())


@pytest.fixture(scope="module")
def plan(checkpoint: Checkpoint) -> BitPlan:
    capabilities = get_target("onnx").capabilities(checkpoint.config, {})
    return make_plan(checkpoint, capabilities, "4", None, target="onnx")


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors whose codes are searched in this test."""
    names: list[str] = []
    search = planned_weights.quantize_tensor

    def record(checkpoint: Checkpoint, plan: BitPlan, name: str) -> object:
        names.append(name)
        return search(checkpoint, plan, name)

    monkeypatch.setattr(planned_weights, "quantize_tensor", record)
    return names


def test_a_tensor_is_searched_once(
    checkpoint: Checkpoint, plan: BitPlan, searches: list[str], tmp_path: Path
) -> None:
    weights = PlannedWeights(checkpoint, plan, codes=StoredCodes(tmp_path))
    first, second = weights.packed((NAME,)), weights.packed((NAME,))
    assert searches == [NAME]
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    expected = planned_weights.quantize_tensor(checkpoint, plan, NAME)
    assert torch.equal(second.dequantize(), expected.dequantize())


def test_an_export_reads_the_codes_of_a_failed_one_and_removes_them(
    checkpoint: Checkpoint,
    plan: BitPlan,
    searches: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LFMC_CACHE", str(tmp_path))
    with pytest.raises(KeyError), open_codes(cache=True) as codes:  # noqa: PT012
        PlannedWeights(checkpoint, plan, codes=codes).packed((NAME,))
        raise KeyError
    assert len(list((tmp_path / "codes").iterdir())) == 1
    with open_codes(cache=True) as codes:
        PlannedWeights(checkpoint, plan, codes=codes).packed((NAME,))
    assert searches == [NAME]
    assert not (tmp_path / "codes").exists()


def test_a_damaged_file_is_written_again(
    checkpoint: Checkpoint, plan: BitPlan, searches: list[str], tmp_path: Path
) -> None:
    PlannedWeights(checkpoint, plan, codes=StoredCodes(tmp_path)).packed((NAME,))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    weights = PlannedWeights(checkpoint, plan, codes=StoredCodes(tmp_path))
    expected = planned_weights.quantize_tensor(checkpoint, plan, NAME)
    assert torch.equal(weights.packed((NAME,)).codes, expected.codes)
    assert searches == [NAME] * 3


def test_a_row_of_another_format_has_other_codes(
    checkpoint: Checkpoint, plan: BitPlan, searches: list[str], tmp_path: Path
) -> None:
    capabilities = get_target("onnx").capabilities(checkpoint.config, {})
    other = make_plan(checkpoint, capabilities, "8", None, target="onnx")
    for rows in (plan, other):
        packed = PlannedWeights(checkpoint, rows, codes=StoredCodes(tmp_path)).packed((NAME,))
        assert packed.format.name == rows.row(NAME).format
    assert searches == [NAME, NAME]


def test_a_tensor_stays_in_memory_if_the_disk_is_full(
    checkpoint: Checkpoint, plan: BitPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_codes, "RESERVE_NBYTES", 1 << 60)
    packed = PlannedWeights(checkpoint, plan, codes=StoredCodes(tmp_path)).packed((NAME,))
    assert list(tmp_path.iterdir()) == []
    expected = planned_weights.quantize_tensor(checkpoint, plan, NAME)
    assert torch.equal(packed.codes, expected.codes)


def test_parts_with_strides_are_stored(
    checkpoint: Checkpoint, plan: BitPlan, tmp_path: Path
) -> None:
    row, packed = plan.row(NAME), planned_weights.quantize_tensor(checkpoint, plan, NAME)
    scales = packed.scales.T.contiguous().T
    assert not scales.is_contiguous()
    stored = StoredCodes(tmp_path).store("key", row, replace(packed, scales=scales))
    assert torch.equal(stored.scales, packed.scales)


def test_old_files_and_the_oldest_above_the_limit_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for name, age in (("new", 0), ("newer", 100), ("older", 200), ("stale", 10 * 24 * 3600)):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (now - age, now - age))
    remove_old_codes(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "newer", "older"}
    monkeypatch.setattr(stored_codes, "MAX_NBYTES", 20)
    remove_old_codes(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "newer"}
