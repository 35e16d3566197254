"""Facts about a plan agree with the plan and with the measured costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lfmc.calib_free.alphaq.spectra import pl_alpha_hill
from lfmc.calib_free.grid.formats import Format
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.report.plan_facts import PlanFacts
from lfmc.report.spectrum_facts import POINTS, select_for_display, spectra_of, spectrum_of
from lfmc.report.tensor_labels import FLOATS, GROUPS, Place, place
from lfmc.targets.base import get_target


@pytest.fixture
def facts(plan_facts: Callable[[str, str], PlanFacts]) -> PlanFacts:
    return plan_facts("lfm2_moe", "auto")


def test_bytes_sum_up_to_the_plan(facts: PlanFacts) -> None:
    plan = facts.plan
    assert sum(g.nbytes for g in facts.groups) + plan.graph_nbytes == plan.nbytes
    assert sum(g.params for g in facts.groups) == plan.num_params
    assert sum(g.tensors for g in facts.groups) == len(plan.rows) == len(facts.tensors)
    assert facts.unused == (plan.limit_nbytes or 0) - plan.nbytes
    assert [g.name for g in facts.groups] == list(GROUPS)
    floats = [t for t in facts.tensors if t.group == FLOATS]
    assert all(not t.quantizable for t in floats)


def test_the_plan_is_a_step_of_its_ladder(facts: PlanFacts) -> None:
    assert facts.ladder is not None
    assert any(
        step.nbytes == facts.plan.nbytes
        and step.kl == pytest.approx(facts.plan.predicted_kl, rel=1e-3)
        for step in facts.ladder.auto
    )


def test_the_chosen_format_is_on_the_curve_with_the_plans_error(facts: PlanFacts) -> None:
    assert facts.curves is not None
    total = 0.0
    for tensor in facts.tensors:
        if isinstance(tensor.format, Format):
            (point,) = (p for p in facts.curves[tensor.row.name] if p.format == tensor.format)
            assert point.error == pytest.approx(tensor.row.error, rel=1e-4)
            assert point.bits_per_weight == pytest.approx(tensor.bits_per_weight)
            total += point.cost
    assert total == pytest.approx(facts.plan.predicted_kl)


def test_kinds_count_every_matrix_once(
    facts: PlanFacts, any_checkpoint: Callable[[str], Checkpoint]
) -> None:
    assert facts.kinds is not None
    matrices = [t for t in facts.tensors if t.quantizable]
    assert sum(sum(k.counts.values()) for k in facts.kinds) == len(matrices)
    kinds = {k.kind: k for k in facts.kinds}
    assert {t.place.kind for t in matrices} == set(kinds)
    formats = get_target("onnx").capabilities(any_checkpoint("lfm2_moe").config).expert
    assert tuple(p.format for p in kinds["experts.w1"].points) == formats


def test_methods_that_measure_no_costs_still_have_spectra(
    plan_facts: Callable[[str, str], PlanFacts],
) -> None:
    uniform = plan_facts("lfm3", "uniform")
    assert uniform.kinds is uniform.curves is uniform.ladder is None
    assert set(uniform.spectra) == {t.row.name for t in uniform.tensors if t.quantizable}
    unquantized = plan_facts("lfm3", "none")
    assert unquantized.unused is None
    assert set(unquantized.spectra) == set(uniform.spectra)


def test_a_spectrum_samples_the_spectrum_of_alphaq() -> None:
    weight = torch.randn(300, 260, generator=torch.Generator().manual_seed(0)).bfloat16()
    spectrum = spectrum_of(weight)
    assert spectrum.alpha == pytest.approx(pl_alpha_hill(weight))
    assert (spectrum.count, spectrum.tail) == (4 * 128, 51)
    assert len(spectrum.ranks) == len(spectrum.shares) <= POINTS
    assert (spectrum.ranks[0], spectrum.ranks[-1]) == (1, spectrum.count)
    assert spectrum.shares[0] == 1.0
    assert list(spectrum.shares) == sorted(spectrum.shares, reverse=True)
    assert spectrum.tail_top == pytest.approx(spectrum.edge * 51 ** (1 / (spectrum.alpha - 1)))


def test_a_matrix_of_zeros_has_no_tail() -> None:
    spectrum = spectrum_of(torch.zeros(20, 20))
    assert spectrum.alpha == math.inf
    assert spectrum.shares == (0.0,) * len(spectrum.ranks)


def test_large_models_show_selected_experts(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    checkpoint = any_checkpoint("lfm2_moe")  # 3 sparse layers of 6 experts
    names = [n for n, info in checkpoint.tensors.items() if len(info.shape) == 2]
    spectra = spectra_of(checkpoint, names, lambda message: None)
    assert select_for_display(spectra) == (names, None)
    selection, rule = select_for_display(spectra, limit=20)
    assert rule is not None
    assert f"{len(names)} matrices" in rule
    assert [n for n in selection if place(n).expert is None] == [
        n for n in names if place(n).expert is None
    ]
    for layer in (1, 2, 3):
        w1 = [n for n in names if place(n) == replace(place(n), kind="experts.w1", layer=layer)]
        selected_w1 = [n for n in selection if n in w1]
        alphas = sorted(spectra[n].alpha for n in w1)
        assert len(w1) == 6
        assert sorted(spectra[n].alpha for n in selected_w1) == [alphas[0], alphas[3], alphas[5]]


def test_places() -> None:
    assert place("model.embed_tokens.weight") == Place("embed_tokens")
    assert place("model.layers.3.conv.in_proj.weight") == Place("conv.in_proj", 3)
    expert = "model.layers.12.feed_forward.experts.31.w2.weight"
    assert place(expert) == Place("experts.w2", 12, 31)
    assert place("model.layers.1.feed_forward.expert_bias").kind == "feed_forward.expert_bias"
