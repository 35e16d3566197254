"""Exports from a checkpoint to a bundle, and every error on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lfmc
from lfmc.bundle.bundle import GOLDEN, PLAN, Bundle, describe_file
from lfmc.calib_free.alphaq.allocation import AlphaQOptions
from lfmc.calib_free.fit.fit import RECIPES, FitRecipe
from lfmc.calib_free.fit.training_loop import TrainingSchedule
from lfmc.calib_free.make_plan import Budget, Effort
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.checkpoint.license import read_metadata
from lfmc.errors import GateError, InputError, LfmcError
from lfmc.exporter.export import Report, export
from lfmc.exporter.reverify import reverify
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.run.generate import check_golden
from lfmc.targets.base import get_target
from lfmc.targets.onnx.target import OnnxTarget

Exported = tuple[Bundle, Report]


def run(output: Path, model: Path | None = None, **options: object) -> Exported:
    bits = None if "plan" in options else "uniform"
    fields = {"bits": bits, "check": "off", "context": 64, **options}
    return export(
        open_checkpoint(model),
        get_target("onnx"),
        output,
        Options(**fields),  # type: ignore[arg-type]
        force=False,
        progress=Silent(),
    )


def test_all_rungs_pass(exported: Exported) -> None:
    _, report = exported
    assert report.verification is not None
    rungs = report.verification.rungs
    assert [rung.number for rung in rungs] == [1, 2, 3, 3, 3, 3]
    assert all(rung.passed and rung.skipped is None for rung in rungs)
    quality = report.verification.quality
    assert quality is not None
    assert 0 < quality.kl < 0.2
    assert quality.top1 > 0.7
    assert quality.perplexity < 1.2 * quality.reference_perplexity


def test_the_budget_counts_every_byte_of_the_artifact(exported: Exported) -> None:
    bundle, report = exported
    limit = report.plan.limit_nbytes
    assert limit == int(4.5 * open_checkpoint().num_params / 8)
    assert 0.99 * report.plan.nbytes <= bundle.nbytes <= report.plan.nbytes <= limit


def test_every_tensor_was_read_back_with_the_planned_error(exported: Exported) -> None:
    _, report = exported
    quantized = [row for row in report.plan.rows if row.format.startswith("int")]
    assert {row.name for row in quantized} == set(report.errors)
    for row in quantized:
        assert report.errors[row.name] == pytest.approx(row.error, rel=0.35), row.name


def test_the_manifest_has_the_facts_an_app_needs(exported: Exported) -> None:
    bundle, _ = exported
    manifest = bundle.manifest
    assert manifest["tokens"] == {"bos": 1, "pad": 0, "stop": [2, 4]}
    assert manifest["context"] == 200
    assert manifest["model"]["fingerprint"] == open_checkpoint().fingerprint
    assert len(manifest["states"]) == 4 + 2 * 2
    assert manifest["can_rewind"] is False
    assert manifest["sampling"] == {}
    assert manifest["model"]["license"] == "apache-2.0"
    assert set(manifest["files"]) == {p.name for p in bundle.path.iterdir()} - {"manifest.json"}
    bundle.check_files()
    assert "/" not in json.dumps(manifest["versions"])


def test_the_model_card_states_size_quality_and_license(exported: Exported) -> None:
    bundle, _ = exported
    card, quality = (bundle.path / "README.md").read_text(), bundle.manifest["report"]["quality"]
    assert read_metadata(bundle.path / "README.md")["license"] == "apache-2.0"
    for text in (
        f"{bundle.nbytes:,} bytes",
        f"{quality['kl']:.4f} nats",
        "lfmc export lfm2-moe-8m --target onnx --bits uniform",
        "the files were executed and compared with the original",
        "The license of the original model applies: apache-2.0.",
    ):
        assert text in card
    assert "changed by lfmc" in (bundle.path / "NOTICE").read_text()
    assert {"README.md", "NOTICE"} <= bundle.manifest["files"].keys()


def test_license_files_are_copied(tmp_path: Path) -> None:
    model = Path(shutil.copytree(demo_path(), tmp_path / "model"))
    (model / "LICENSE").write_text("the license")
    (model / "NOTICE").write_text("the original notice")
    bundle, _ = run(tmp_path / "out", model)
    assert (bundle.path / "LICENSE").read_text() == "the license"
    notice = (bundle.path / "NOTICE").read_text()
    assert notice.startswith("the original notice\n\n")
    assert "changed by lfmc" in notice


def test_golden_prompts_continue_the_same(exported: Exported) -> None:
    bundle, _ = exported
    golden = bundle.read_json(GOLDEN)
    stepper = lfmc.load(bundle.path)
    check_golden(stepper, golden)
    golden[0]["tokens"][-1] ^= 1
    with pytest.raises(GateError, match="golden prompt"):
        check_golden(stepper, golden)


def test_fitted_tensors_are_exported_and_verified(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        RECIPES, "best", FitRecipe(8, 32, TrainingSchedule(4, 4), TrainingSchedule(4, 4))
    )
    options = Options(bits="2", effort=Effort("best"), check="fast", context=256)
    checkpoint, target = open_checkpoint(tiny_checkpoint("lfm2_moe")), get_target("onnx")
    bundle, report = export(
        checkpoint, target, tmp_path / "bundle", options, force=False, progress=Silent()
    )
    assert len(report.plan.fitted_names) > 80
    assert report.verification is not None
    assert all(rung.passed for rung in report.verification.rungs)
    stored = BitPlan.from_json((bundle.path / PLAN).read_text())
    assert stored.fitted_names == report.plan.fitted_names
    assert not (bundle.path / "plan.fitted").exists()  # the model file stores them
    results = reverify(bundle, checkpoint, Silent(), check="fast")
    assert results["parity"][1]["number"] == 2
    name = sorted(stored.fitted_names)[0]
    rows = [replace(r, digest="0" * 64) if r.name == name else r for r in stored.rows]
    (bundle.path / PLAN).write_text(replace(stored, rows=tuple(rows)).to_json())
    entry = bundle.manifest["files"][PLAN]
    entry.update(describe_file(bundle.path / PLAN))
    with pytest.raises(InputError, match="not those of the plan"):
        reverify(bundle, checkpoint, Silent(), check="fast")


def test_load_steps_and_resets(exported: Exported) -> None:
    model = lfmc.load(exported[0].path)
    first = model.step([1, 2, 3])
    assert first.shape == (3, 8192)
    model.step([4])
    model.reset()
    assert model.step([1, 2, 3]).equal(first)


def test_a_plan_is_replayed_to_the_bit(exported: Exported, tmp_path: Path) -> None:
    bundle, report = exported
    again, second = run(tmp_path / "again", plan=bundle.path / PLAN, context=200)
    assert second.plan == report.plan
    assert (again.path / "model.onnx.data").read_bytes() == (
        bundle.path / "model.onnx.data"
    ).read_bytes()


def test_a_dry_plan_equals_the_exported_one(exported: Exported) -> None:
    """All but the graph's size: a dry plan reserves an estimate, an export knows the size."""
    dry, plan = lfmc.plan(bits="uniform"), exported[1].plan
    assert replace(dry, graph_nbytes=plan.graph_nbytes) == plan
    assert plan.graph_nbytes <= dry.graph_nbytes


def test_an_unchecked_export_has_no_parity_in_its_manifest(tmp_path: Path) -> None:
    bundle, report = run(tmp_path / "b")
    assert report.verification is None
    assert bundle.manifest["report"]["parity"] is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 0}, InputError, "context"),
        ({"max_kl": 0.1}, InputError, "needs a measurement"),
        ({"min_top1": 90.0, "check": "fast"}, InputError, "out of range"),
        ({"max_kl": float("nan"), "check": "fast"}, InputError, "out of range"),
        ({"plan": Path("plan.json"), "bits": "4"}, InputError, "already sets"),
        ({"plan": Path("p"), "budget": Budget(4.5)}, InputError, "already sets"),
        ({"plan": Path("p"), "alphaq": AlphaQOptions()}, InputError, "already sets"),
        ({"alphaq": AlphaQOptions()}, InputError, "for method 'alphaq'"),
        ({"bits": "alphaq", "alphaq": AlphaQOptions(bits=(3,))}, InputError, "bit widths"),
        ({"context": 10**6}, InputError, "context"),
        ({"target_options": {"layout": "tflite"}}, InputError, "no such layout"),
        ({"target_options": {"colour": "red"}}, InputError, "no such option"),
        ({"check": "maybe"}, InputError, "no such check"),
        ({"bits": "5"}, InputError, "no such method"),
        ({"bits": "3"}, InputError, "at 3 bits"),
        ({"budget": Budget(bits_per_weight=1.0)}, InputError, "smallest possible"),
        ({"budget": Budget(max_bytes=1000)}, InputError, "smallest possible"),
        ({"plan": Path("nowhere.json")}, InputError, "can't be read"),
    ],
)
def test_impossible_options_are_refused_and_nothing_is_written(
    tmp_path: Path, options: dict[str, object], error: type[LfmcError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_budget_of_the_message_is_possible(tmp_path: Path) -> None:
    with pytest.raises(InputError) as excinfo:
        run(tmp_path / "b", budget=Budget(max_bytes=1000))
    smallest = int(str(excinfo.value).split("bits per weight, ")[1].split(" bytes")[0])
    bundle, _ = run(tmp_path / "b", budget=Budget(max_bytes=smallest))
    assert bundle.nbytes <= smallest


def test_a_plan_for_another_checkpoint_is_refused(exported: Exported, tmp_path: Path) -> None:
    other_plan = replace(exported[1].plan, fingerprint="0" * 64)
    (tmp_path / "plan.json").write_text(other_plan.to_json())
    with pytest.raises(InputError, match="another checkpoint"):
        run(tmp_path / "b", plan=tmp_path / "plan.json")


def test_an_edited_plan_is_used(exported: Exported, tmp_path: Path) -> None:
    text = exported[1].plan.to_json()
    plan = BitPlan.from_json(text)
    prefix = "model.layers.2.feed_forward.experts.3."
    rows = [
        replace(row, format="int8-g64-asym-float16", nbytes=nbytes)
        if row.name.startswith(prefix)
        and (nbytes := plan_bytes(row.shape, "int8-g64-asym-float16"))
        else row
        for row in plan.rows
    ]
    edited = replace(plan, rows=tuple(rows), limit_nbytes=None)
    (tmp_path / "plan.json").write_text(edited.to_json())
    bundle, _ = run(tmp_path / "b", plan=tmp_path / "plan.json", check="fast")
    names = [t["name"] for t in bundle.manifest["tensors"]]
    assert "model.layers.2.feed_forward.experts.8bit.w2.codes" in names
    assert "model.layers.1.feed_forward.experts.8bit.w2.codes" not in names


def plan_bytes(shape: tuple[int, ...], name: str) -> int:
    from lfmc.calib_free.grid.formats import parse_format

    return parse_format(name).nbytes(shape)


@pytest.mark.parametrize("gate", [{"max_kl": 1e-6}, {"min_top1": 0.9999}])
def test_a_quality_gate_fails_the_export(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, gate: dict[str, float]
) -> None:
    with pytest.raises(GateError) as excinfo:
        run(tmp_path / "b", tiny_checkpoint("lfm2_moe"), check="fast", **gate)
    assert excinfo.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxTarget, "lower", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_reserve_that_is_too_small_does_not_break_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfmc.targets.onnx.target.GRAPH", 0)
    monkeypatch.setattr("lfmc.targets.onnx.target.GRAPH_PER_LAYER", 0)
    plan = lfmc.plan(bits="uniform")
    bundle, _ = run(tmp_path / "b", budget=Budget(max_bytes=plan.nbytes))
    assert bundle.nbytes <= plan.nbytes


def test_the_demo_is_package_data() -> None:
    assert (demo_path() / "README.md").is_file()
    assert open_checkpoint().path == demo_path()


def test_without_transformers_rung_1_is_skipped_with_the_reason(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lfmc.verification.rungs.is_available", lambda: False)
    bundle, report = run(tmp_path / "b", tiny_checkpoint("lfm2_moe"), check="fast")
    assert report.verification is not None
    first = report.verification.rungs[0]
    assert first.skipped is not None
    assert "transformers is not installed" in first.skipped
    assert bundle.manifest["report"]["parity"][0]["passed"] is False
