from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfmc.calib_free.grid.formats import GENERIC, Format
from lfmc.calib_free.grid.grid_search import quantize
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import FITTED, BitPlan, fitted_folder
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.fitted_tensors import (
    FittedFolder,
    digest_parts,
    packed_from_parts,
    save_fitted,
    tensor_parts,
)
from lfmc.calib_free.plan.planned_tensors import float_tensor, quantize_tensor
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from tests.calib_free.conftest import MakeCheckpoint

IN_PROJ = "model.layers.0.conv.in_proj.weight"
NORM = "model.embedding_norm.weight"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.sampled_from([8, 32]), st.booleans(), st.integers(1, 70))
def test_parts_round_trip(bits: int, group: int, symmetric: bool, columns: int) -> None:
    number_format = Format(bits, group, symmetric, "float16")
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    packed = quantize(weight, number_format, None, "clip")
    restored = packed_from_parts(tensor_parts(packed), number_format, (3, columns))
    assert torch.equal(restored.dequantize(), packed.dequantize())
    assert digest_parts(tensor_parts(restored)) == digest_parts(tensor_parts(packed))


def test_a_digest_distinguishes_bits_shapes_and_dtypes() -> None:
    base = {"values": torch.tensor([1.0, 2.0])}
    variants = [
        {"values": torch.tensor([1.0, 2.0000002])},
        {"values": torch.tensor([[1.0, 2.0]])},
        {"values": torch.tensor([1.0, 2.0]).bfloat16()},
        {"scales": torch.tensor([1.0, 2.0])},
    ]
    digests = {digest_parts(base), *map(digest_parts, variants)}
    assert len(digests) == 5
    assert digest_parts({"values": torch.tensor([1.0, 2.0])}) == digest_parts(base)


def fitted_plan(checkpoint: Checkpoint) -> BitPlan:
    """Return a plan with a fitted matrix and a fitted norm."""
    plan = make_plan(checkpoint, GENERIC, "4", None)
    row = plan.row(IN_PROJ)
    packed = quantize(
        torch.ones(row.shape[0], row.shape[1]), Format.parse(row.format), None, "clip"
    )
    fitted = {
        IN_PROJ: tensor_parts(packed),
        NORM: {"values": torch.full(plan.row(NORM).shape, 0.5, dtype=torch.bfloat16)},
    }
    rows = [
        replace(r, grid=FITTED, digest=digest_parts(fitted[r.name])) if r.name in fitted else r
        for r in plan.rows
    ]
    return replace(plan, rows=tuple(rows), fitted=fitted)


def test_a_saved_plan_loads_its_fitted_tensors(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan = fitted_plan(checkpoint)
    plan.save(tmp_path / "plan.json")
    loaded = BitPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.fitted_names == {IN_PROJ, NORM}
    check_plan(loaded, checkpoint, GENERIC)
    assert float(quantize_tensor(checkpoint, loaded, IN_PROJ).dequantize().mean()) == 1.0
    assert float(float_tensor(checkpoint, loaded, NORM).float().mean()) == 0.5


def test_missing_or_changed_fitted_tensors_are_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan = fitted_plan(checkpoint)
    path = tmp_path / "plan.json"
    plan.save(path)
    without = replace(plan, fitted={})
    with pytest.raises(InputError, match="missing") as caught:
        quantize_tensor(checkpoint, without, IN_PROJ)
    assert caught.value.where == IN_PROJ
    changed = {IN_PROJ: {**plan.fitted[IN_PROJ], "scales": plan.fitted[IN_PROJ]["scales"] * 2}}
    with pytest.raises(InputError, match="not those of the plan"):
        quantize_tensor(checkpoint, replace(plan, fitted=changed), IN_PROJ)
    rows = tuple(
        replace(r, format=r.format.replace("int4", "int3")) if r.name == IN_PROJ else r
        for r in plan.rows
    )
    with pytest.raises(InputError, match="another format") as caught:
        quantize_tensor(checkpoint, replace(plan, rows=rows), IN_PROJ)
    assert caught.value.where == IN_PROJ
    file = next(fitted_folder(path).iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="can't be read"):
        BitPlan.load(path)
    file.unlink()
    with pytest.raises(InputError, match="are missing"):
        BitPlan.load(path)


def test_a_row_with_a_digest_needs_the_fitted_grid(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint("lfm2")
    plan = fitted_plan(checkpoint)
    rows = tuple(replace(r, grid="clip") if r.name == IN_PROJ else r for r in plan.rows)
    with pytest.raises(InputError, match="grid"):
        check_plan(replace(plan, rows=rows), checkpoint, GENERIC)


def test_a_fitted_folder_reads_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "plan.fitted"
    folder.mkdir()
    save_fitted(folder / "a.safetensors", {"x": {"values": torch.ones(2)}})
    save_fitted(folder / "b.safetensors", {"y": {"values": torch.ones(3)}})
    fitted = FittedFolder(folder)
    assert sorted(fitted) == ["x", "y"]
    assert len(fitted) == 2
    assert fitted["y"]["values"].shape == (3,)
