from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lfmc.calib_free.grid.formats import GENERIC, Format, parse_format
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan, PlanRow
from lfmc.calib_free.plan.check_plan import check_plan
from lfmc.calib_free.plan.planned_tensors import dequantized_weights, float_tensor, quantize_tensor
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError

EMBEDDING = "model.embed_tokens.weight"
IN_PROJ = "model.layers.0.conv.in_proj.weight"
NORM = "model.embedding_norm.weight"
W1 = "model.layers.1.feed_forward.experts.0.w1.weight"


@pytest.fixture(scope="module")
def plan(demo: Checkpoint) -> BitPlan:
    return make_plan(demo, GENERIC, "alphaq", Budget(4.5))


def edited(plan: BitPlan, name: str, **changes: Any) -> BitPlan:
    """Return the plan with one row changed, and with consistent bytes unless `nbytes` is passed."""
    rows = []
    for row in plan.rows:
        if row.name == name:
            row = replace(row, **changes)
            if "format" in changes and "nbytes" not in changes:
                row = replace(row, nbytes=parse_format(row.format).nbytes(row.shape))
        rows.append(row)
    return replace(plan, rows=tuple(rows), limit_nbytes=None)


def test_json_round_trips(plan: BitPlan) -> None:
    assert BitPlan.from_json(plan.to_json()) == plan


def test_json_has_one_line_per_row(plan: BitPlan) -> None:
    lines = plan.to_json().splitlines()
    for row in plan.rows:
        assert sum(f'"name": "{row.name}"' in line for line in lines) == 1


def test_a_plan_reports_its_size(plan: BitPlan) -> None:
    assert plan.nbytes == sum(row.nbytes for row in plan.rows)
    assert plan.bits_per_weight == 8 * plan.nbytes / plan.num_params
    assert replace(plan, graph_nbytes=7).nbytes == plan.nbytes + 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=99), "version"),
        (lambda raw: raw.pop("rows"), "no rows"),
        (lambda raw: raw.update(rows=[3]), "not an object"),
        (lambda raw: raw.update(extra=1), "unknown keys"),
        (lambda raw: raw.pop("seed"), "unknown keys"),
        (lambda raw: raw["rows"][0].pop("nbytes"), "unknown keys"),
        (lambda raw: raw["rows"][0].update(nbytes="12"), "'nbytes' has the wrong type"),
        (lambda raw: raw["rows"][0].update(nbytes=True), "'nbytes' has the wrong type"),
        (lambda raw: raw["rows"][0].update(shape=[1.5]), "not a list of integers"),
    ],
)
def test_invalid_plan_json_is_refused(
    plan: BitPlan, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    raw = json.loads(plan.to_json())
    change(raw)
    with pytest.raises(InputError, match=message):
        BitPlan.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_text_that_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        BitPlan.from_json(text)


def test_a_valid_edit_passes_the_check(demo: Checkpoint, plan: BitPlan) -> None:
    check_plan(plan, demo, GENERIC)
    check_plan(edited(plan, IN_PROJ, format="int8-g32-asym-float16", grid="clip"), demo, GENERIC)
    check_plan(edited(plan, IN_PROJ, format="float16", grid="none"), demo, GENERIC)


WRONG: list[tuple[Callable[[BitPlan], BitPlan], str]] = [
    (lambda p: replace(p, fingerprint="0" * 64), "fingerprint"),
    (lambda p: replace(p, num_params=5), "num_params"),
    (lambda p: replace(p, graph_nbytes=-1), "graph_nbytes"),
    (lambda p: replace(p, rows=p.rows[1:]), EMBEDDING),
    (lambda p: replace(p, rows=(*p.rows, p.rows[0])), EMBEDDING),
    (lambda p: replace(p, rows=(*p.rows, replace(p.rows[0], name="model.x.weight"))), "model.x"),
    (lambda p: edited(p, IN_PROJ, shape=(1, 2)), IN_PROJ),
    (lambda p: edited(p, IN_PROJ, role="norm"), IN_PROJ),
    (lambda p: edited(p, IN_PROJ, format="int4", nbytes=1), IN_PROJ),
    (lambda p: edited(p, IN_PROJ, format="int7-g32-asym-float16"), IN_PROJ),
    (lambda p: edited(p, NORM, format="int4-g32-asym-float16", nbytes=1), NORM),
    (lambda p: edited(p, NORM, grid="clip"), NORM),
    (lambda p: edited(p, IN_PROJ, grid="none"), IN_PROJ),
    (lambda p: edited(p, IN_PROJ, nbytes=1), IN_PROJ),
    (lambda p: edited(p, IN_PROJ, importance="abc"), IN_PROJ),
    (lambda p: edited(p, W1, format="int4-g32-asym-float16"), W1),
    (lambda p: replace(p, limit_nbytes=p.nbytes - 1), "limit_nbytes"),
    (lambda p: replace(p, limit_nbytes=p.nbytes - 1, graph_nbytes=0), "limit_nbytes"),
]


@pytest.mark.parametrize(("change", "where"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_plan_is_refused_by_name(
    demo: Checkpoint, plan: BitPlan, change: Callable[[BitPlan], BitPlan], where: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_plan(change(plan), demo, GENERIC)
    assert where in str(caught.value)


def test_merged_projections_must_agree(demo: Checkpoint, plan: BitPlan) -> None:
    merged = replace(GENERIC, merged=(("q_proj", "k_proj", "v_proj"),))
    check_plan(plan, demo, merged)
    name = "model.layers.2.self_attn.k_proj.weight"
    changed = edited(plan, name, format="int4-g32-asym-float16")
    check_plan(changed, demo, GENERIC)
    with pytest.raises(InputError, match="stores together") as caught:
        check_plan(changed, demo, merged)
    assert name in str(caught.value)


def test_experts_of_a_layer_must_share_what_the_target_shares(
    demo: Checkpoint, plan: BitPlan
) -> None:
    shared = replace(GENERIC, expert_layer_shares_group=True)
    check_plan(plan, demo, shared)
    changed = edited(plan, W1.replace("w1", "w2"), format="int4-g32-asym-float16")
    check_plan(changed, demo, GENERIC)
    with pytest.raises(InputError, match="more than their bit widths"):
        check_plan(changed, demo, shared)


def test_signed_scales_need_a_target_that_supports_them(demo: Checkpoint, plan: BitPlan) -> None:
    changed = edited(plan, IN_PROJ, format="int4-g32-sym-float16", grid="signed")
    check_plan(changed, demo, GENERIC)
    with pytest.raises(InputError, match="grid"):
        check_plan(changed, demo, replace(GENERIC, negative_scales=False))


def test_codes_are_replayed_to_the_bit(demo: Checkpoint, plan: BitPlan) -> None:
    changed = edited(plan, IN_PROJ, format="int3-g32-sym-float16", grid="signed")
    first, second = (quantize_tensor(demo, changed, IN_PROJ) for _ in range(2))
    assert first.format == Format(3, 32, True, "float16")
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert first.nbytes == changed.row(IN_PROJ).nbytes


def test_importance_letters_change_the_codes(demo: Checkpoint, plan: BitPlan) -> None:
    columns = demo.tensors[IN_PROJ].shape[1]
    by_norm = edited(plan, IN_PROJ, format="int3-g64-asym-float16", grid="clip")
    flat, sharp = (
        edited(by_norm, IN_PROJ, importance=letters)
        for letters in ("a" * columns, "a" + "z" * (columns - 1))
    )
    codes = [quantize_tensor(demo, p, IN_PROJ).codes for p in (by_norm, flat, sharp)]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[1], codes[2])


def test_weights_are_computed_on_access(demo: Checkpoint, plan: BitPlan) -> None:
    weights = dequantized_weights(demo, plan)
    assert list(weights) == [row.name for row in plan.rows]
    assert len(weights) == len(plan.rows)
    expected = quantize_tensor(demo, plan, W1).dequantize()
    assert torch.equal(weights[W1], expected)
    assert torch.equal(weights[NORM], demo.load(NORM).float())
    assert torch.equal(demo.decoder(weights).get_parameter(W1), expected)
    with pytest.raises(KeyError):
        weights["model.x.weight"]


def test_floats_have_the_dtype_of_their_row(demo: Checkpoint, plan: BitPlan) -> None:
    assert float_tensor(demo, plan, NORM).dtype == torch.bfloat16
    assert float_tensor(demo, edited(plan, NORM, format="float32"), NORM).dtype == torch.float32


def test_codes_and_floats_have_separate_functions(demo: Checkpoint, plan: BitPlan) -> None:
    with pytest.raises(InputError, match="not as codes"):
        quantize_tensor(demo, plan, NORM)
    with pytest.raises(InputError, match="not as floats"):
        float_tensor(demo, plan, W1)
    with pytest.raises(InputError, match="no row for tensor"):
        plan.row("model.x.weight")


def test_a_float_too_large_for_its_dtype_is_refused(
    demo: Checkpoint, plan: BitPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: torch.tensor([1e30]))
    with pytest.raises(InputError, match="too large for float16"):
        float_tensor(demo, edited(plan, NORM, format="float16"), NORM)


def test_alpha_and_importance_are_optional() -> None:
    row = PlanRow("w", (1, 2), "linear", "float32", "none", 8, "kept", 0.0)
    assert (row.alpha, row.importance) == (None, None)
