"""The pages are well-formed and self-contained, and all text is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from lfmc.calib_free.auto.budget_ladder import Ladder, Step
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.footprint import footprint, footprints
from lfmc.report import heat_map as heat
from lfmc.report.model_facts import gather_model
from lfmc.report.model_page import model_page
from lfmc.report.plan_facts import PlanFacts
from lfmc.report.plan_page import plan_page
from lfmc.report.spectrum_facts import spectrum_of

VOID = ("meta", "input", "br")
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


class Page(HTMLParser):
    """Parse a page: fails if tags do not match; collects attributes, and text by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def parse_page(text: str) -> Page:
    """Parse a page and assert that it is well-formed, has unique ids and loads nothing."""
    page = Page(text)
    assert not any(tag in ("link", "img", "iframe", "base") for tag, _, _ in page.attributes)
    assert not any(name in ("src", "href", "srcset", "action") for _, name, _ in page.attributes)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert not re.search(r"@import|url\(|<link", text)
    assert set(re.findall(r"https?://[^\s\"]+", text)) <= {"http://www.w3.org/2000/svg"}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    return page


@pytest.fixture
def facts(plan_facts: Callable[[str, str], PlanFacts]) -> PlanFacts:
    return plan_facts("lfm2_moe", "auto")


def data_of(page: Page) -> dict[str, list[list[str]]]:
    """Return the JSON data of a plan's page."""
    data: dict[str, list[list[str]]] = json.loads(page.texts["script"][0])
    return data


def test_the_page_of_a_plan(facts: PlanFacts) -> None:
    page = parse_page(plan_page(facts))
    words = " ".join(page.texts["dd"])
    assert f"{facts.plan.nbytes:,} bytes" in words
    assert facts.plan.fingerprint in words
    data = data_of(page)
    assert [lines[0] for lines in data["texts"]] == [row.name for row in facts.plan.rows]
    assert len(data["full"]) == len(facts.spectra)
    assert "this plan" in page.texts["text"]
    cells = [value for _, name, value in page.attributes if name == "data-t"]
    matrices = [i for i, t in enumerate(facts.tensors) if t.quantizable]
    layers, experts = (
        heat.layer_map(facts.tensors, facts.layer_types),
        heat.expert_map(facts.tensors),
    )
    assert experts is not None
    assert len(cells) == len(layers.cells) + len(experts.cells)
    assert sorted(i for c in layers.cells for i in c.tensors) == matrices


def test_bars_fill_the_budget(facts: PlanFacts) -> None:
    page = parse_page(plan_page(facts))
    widths = [
        float(value.rstrip("%"))
        for tag, name, value in page.attributes
        if tag == "rect" and name == "width" and value.endswith("%")
    ]
    assert sum(widths) == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize("bits", ["uniform", "none", "4"])
def test_sections_without_numbers_say_why(
    plan_facts: Callable[[str, str], PlanFacts], bits: str
) -> None:
    page = parse_page(plan_page(plan_facts("lfm3", bits)))
    why = [text for text in page.texts["p"] if text.startswith(f"Method {bits} measures no costs")]
    assert len(why) == 3  # the curve of a tensor, the curves of kinds, the ladder
    assert sorted(page.texts["h2"]) == sorted(
        [
            "Where the bytes go",
            "Bits by layer",
            "One tensor",
            "Error by kind of matrix",
            "Predicted quality at other budgets",
        ]
    )


def test_a_plan_with_zero_costs_has_no_ladder_plot(facts: PlanFacts) -> None:
    step = Step(facts.plan.nbytes, 0.0)
    without_costs = replace(
        facts,
        plan=replace(facts.plan, predicted_kl=0.0),
        ladder=Ladder((step,), (step,), 0.0),
        spectra={name: spectrum_of(torch.zeros(4, 4)) for name in facts.spectra},
    )
    page = parse_page(plan_page(without_costs))
    assert "There is nothing to plot: all measured costs are zero." in page.texts["p"]


def test_names_with_html_are_escaped(facts: PlanFacts) -> None:
    row = replace(facts.plan.rows[0], reason=HOSTILE)
    tensors = (replace(facts.tensors[0], row=row), *facts.tensors[1:])
    plan = replace(facts.plan, target=HOSTILE)
    text = plan_page(replace(facts, model=HOSTILE, plan=plan, tensors=tensors))
    page = parse_page(text)
    assert "<img" not in text
    assert HOSTILE in "".join(page.texts["h1"])
    assert HOSTILE in data_of(page)["texts"][0]


def test_the_page_of_a_checkpoint(any_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = any_checkpoint("lfm3")
    facts = gather_model(checkpoint)
    assert list(facts.memory) == footprints(checkpoint)
    assert all(f == footprint(checkpoint, f.context) for f in facts.curve)
    assert facts.curve[-1].context == checkpoint.config.max_context
    assert sum(facts.roles.values()) == facts.parameters
    page = parse_page(model_page(facts))
    assert "8 tokens" in page.texts["dd"]  # the sliding window
    hostile = model_page(replace(facts, name=HOSTILE))
    assert HOSTILE in "".join(parse_page(hostile).texts["h1"])


def test_shades_cover_the_scale() -> None:
    assert heat.shade(0.5) == heat.shade(2.0) == 0
    assert heat.shade(9.0) == heat.SHADES - 1
    assert heat.shade(16.0) == heat.FLOAT
    for stops in (heat.LIGHT, heat.DARK):
        colours = heat.colours(stops)
        assert len(colours) == heat.SHADES
        assert (colours[0][0], colours[-1][0]) == (stops[0], stops[-1])
        assert {text for _, text in colours} == {"#fff", "#111"}
