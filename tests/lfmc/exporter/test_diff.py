"""`lfmc diff`: what two plans or bundles differ in, and where their activations part."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.commands.diff import command
from lfmc.errors import InputError
from lfmc.exporter.diff import Side, difference, open_side, with_activations
from lfmc.exporter.export import export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint("lfm2"))


def side(checkpoint: Checkpoint, bits: str) -> Side:
    return Side(Path(f"{bits}.json"), make_plan(checkpoint, GENERIC, bits, None), None)


def with_layer(plan: BitPlan, other: BitPlan, layer: int) -> BitPlan:
    """`plan`, but for one layer, which is stored as in `other`."""
    inside = f"layers.{layer}."
    return replace(
        plan, rows=tuple(other.row(r.name) if inside in r.name else r for r in plan.rows)
    )


def test_tensors_and_sizes(checkpoint: Checkpoint) -> None:
    four, eight = side(checkpoint, "4"), side(checkpoint, "8")
    mixed = replace(four, plan=with_layer(four.plan, eight.plan, 2))
    found = difference(four, mixed)
    assert {own.name.split(".")[2] for own in found.changed} == {"2"}
    assert all(own.first != own.second and own.nbytes > 0 for own in found.changed)
    grown = sum(own.nbytes for own in found.changed)
    first, second = found.numbers["plan_nbytes"]
    assert (first, second) == (four.plan.nbytes, four.plan.nbytes + grown)
    assert found.numbers["kl"] == (None, None)
    assert difference(four, four).changed == ()


def test_rows_that_only_one_has(checkpoint: Checkpoint) -> None:
    whole = side(checkpoint, "4")
    less = replace(whole, plan=replace(whole.plan, rows=whole.plan.rows[1:]))
    (own,) = difference(less, whole).changed
    assert (own.first, own.name) == (None, whole.plan.rows[0].name)
    assert own.nbytes == whole.plan.rows[0].nbytes


def test_fitted_codes_are_other_codes(checkpoint: Checkpoint) -> None:
    one = side(checkpoint, "4")
    row = next(r for r in one.plan.rows if r.role == "linear")
    rows = tuple(replace(r, digest="ab" * 32) if r is row else r for r in one.plan.rows)
    (own,) = difference(one, replace(one, plan=replace(one.plan, rows=rows))).changed
    assert own.name == row.name
    assert str(own.second).endswith("abababab")


def test_activations_part_behind_the_layer_that_differs(checkpoint: Checkpoint) -> None:
    four, eight = side(checkpoint, "4"), side(checkpoint, "8")
    mixed = replace(eight, plan=with_layer(eight.plan, four.plan, 2))
    found = with_activations(
        difference(mixed, eight, apart=0.0), mixed, eight, checkpoint, Silent()
    )
    assert [own.part for own in found.streams] == ["embedding", *(f"layer {n}" for n in range(4))]
    assert [own.between > 0 for own in found.streams] == [False, False, False, True, True]
    assert found.parts_at == "layer 2"
    assert all(own.second < own.first for own in found.streams[3:])
    assert replace(found, apart=1e9).parts_at is None


def test_another_checkpoint_is_refused(
    checkpoint: Checkpoint, tiny_checkpoint: Callable[..., Path]
) -> None:
    one, other = side(checkpoint, "4"), open_checkpoint(tiny_checkpoint("lfm2-untied"))
    with pytest.raises(InputError, match="made from another checkpoint"):
        with_activations(difference(one, one), one, one, other, Silent())


def test_a_bundle_beside_a_plan(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = Options(bits="4", context=48, check="off", cache=False)
    given = checkpoint, get_target("onnx"), tmp_path / "bundle", options
    bundle, report = export(*given, force=False, progress=Silent())
    plan = tmp_path / "plan.json"
    side(checkpoint, "8").plan.save(plan)
    paths = [str(bundle.path), str(plan)]
    done = CliRunner().invoke(command, [*paths, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["numbers"]["artifact_nbytes"] == [report.nbytes, None]
    assert found["facts"]["target"][0] == "onnx"
    assert found["facts"]["context"] == [48, None]
    assert {own["name"] for own in found["changed"]} <= {row.name for row in report.plan.rows}
    shown = CliRunner().invoke(command, paths, catch_exceptions=False).stdout
    assert shown.startswith(f"tensors stored otherwise: {len(found['changed'])} of ")
    assert "context: 48 -> None" in shown
    again = (
        CliRunner()
        .invoke(command, [str(bundle.path)] * 2 + ["--activations", str(checkpoint.path)])
        .stdout
    )
    assert "made alike: same formats, options and versions" in again
    assert "they part by more than 5.00% nowhere" in again


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        open_side(tmp_path / "none.json")
    with pytest.raises(InputError, match="holds no finished bundle"):
        open_side(tmp_path)
