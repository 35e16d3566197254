"""`lfmc diff`: the differences of two plans or bundles, and where activations diverge."""

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
from lfmc.exporter.diff import DiffInput, compare_activations, compare_plans, open_diff_input
from lfmc.exporter.export import export
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.targets.base import get_target


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint("lfm2"))


def make_input(checkpoint: Checkpoint, bits: str) -> DiffInput:
    return DiffInput(Path(f"{bits}.json"), make_plan(checkpoint, GENERIC, bits, None), None)


def with_layer(plan: BitPlan, other: BitPlan, layer: int) -> BitPlan:
    """Return `plan` with one layer stored as in `other`."""
    prefix = f"layers.{layer}."
    return replace(
        plan, rows=tuple(other.row(row.name) if prefix in row.name else row for row in plan.rows)
    )


def test_tensors_and_sizes(checkpoint: Checkpoint) -> None:
    four, eight = make_input(checkpoint, "4"), make_input(checkpoint, "8")
    mixed = replace(four, plan=with_layer(four.plan, eight.plan, 2))
    difference = compare_plans(four, mixed)
    assert {tensor.name.split(".")[2] for tensor in difference.changed} == {"2"}
    assert all(t.first != t.second and t.nbytes > 0 for t in difference.changed)
    added_nbytes = sum(tensor.nbytes for tensor in difference.changed)
    first, second = difference.numbers["plan_nbytes"]
    assert (first, second) == (four.plan.nbytes, four.plan.nbytes + added_nbytes)
    assert difference.numbers["kl"] == (None, None)
    assert compare_plans(four, four).changed == ()


def test_a_row_of_only_one_plan_is_a_change(checkpoint: Checkpoint) -> None:
    complete = make_input(checkpoint, "4")
    partial = replace(complete, plan=replace(complete.plan, rows=complete.plan.rows[1:]))
    (tensor,) = compare_plans(partial, complete).changed
    assert (tensor.first, tensor.name) == (None, complete.plan.rows[0].name)
    assert tensor.nbytes == complete.plan.rows[0].nbytes


def test_fitted_codes_are_a_change(checkpoint: Checkpoint) -> None:
    rounded = make_input(checkpoint, "4")
    row = next(r for r in rounded.plan.rows if r.role == "linear")
    rows = tuple(replace(r, digest="ab" * 32) if r is row else r for r in rounded.plan.rows)
    fitted = replace(rounded, plan=replace(rounded.plan, rows=rows))
    (tensor,) = compare_plans(rounded, fitted).changed
    assert tensor.name == row.name
    assert str(tensor.second).endswith("abababab")


def test_activations_diverge_after_the_layer_that_differs(checkpoint: Checkpoint) -> None:
    four, eight = make_input(checkpoint, "4"), make_input(checkpoint, "8")
    mixed = replace(eight, plan=with_layer(eight.plan, four.plan, 2))
    difference = compare_activations(
        compare_plans(mixed, eight, apart=0.0), mixed, eight, checkpoint, Silent()
    )
    assert [stream.part for stream in difference.streams] == [
        "embedding",
        *(f"layer {n}" for n in range(4)),
    ]
    assert [s.between > 0 for s in difference.streams] == [False, False, False, True, True]
    assert difference.diverges_at == "layer 2"
    assert difference.to_dict()["parts_at"] == "layer 2"
    assert all(stream.second < stream.first for stream in difference.streams[3:])
    assert replace(difference, apart=1e9).diverges_at is None


def test_another_checkpoint_is_refused(
    checkpoint: Checkpoint, tiny_checkpoint: Callable[..., Path]
) -> None:
    source, other = make_input(checkpoint, "4"), open_checkpoint(tiny_checkpoint("lfm2-untied"))
    with pytest.raises(InputError, match="made from another checkpoint"):
        compare_activations(compare_plans(source, source), source, source, other, Silent())


def test_a_bundle_is_compared_with_a_plan(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = Options(bits="4", context=48, check="off", cache=False)
    arguments = checkpoint, get_target("onnx"), tmp_path / "bundle", options
    bundle, report = export(*arguments, force=False, progress=Silent())
    plan = tmp_path / "plan.json"
    make_input(checkpoint, "8").plan.save(plan)
    paths = [str(bundle.path), str(plan)]
    result = CliRunner().invoke(command, [*paths, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    difference = json.loads(result.stdout)
    changed = difference["changed"]
    assert difference["numbers"]["artifact_nbytes"] == [report.nbytes, None]
    assert difference["facts"]["target"][0] == "onnx"
    assert difference["facts"]["context"] == [48, None]
    assert {tensor["name"] for tensor in changed} <= {row.name for row in report.plan.rows}
    text = CliRunner().invoke(command, paths, catch_exceptions=False).stdout
    assert text.startswith(f"tensors stored differently: {len(changed)} of ")
    assert "context: 48 -> None" in text
    same = [str(bundle.path), str(bundle.path), "--activations", str(checkpoint.path)]
    text = CliRunner().invoke(command, same).stdout
    assert "formats, options and versions are equal" in text
    assert "activations differ by more than 5.00%: nowhere" in text


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        open_diff_input(tmp_path / "none.json")
    with pytest.raises(InputError, match="contains no finished bundle"):
        open_diff_input(tmp_path)
