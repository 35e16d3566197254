"""Draws the plots of docs/allocation.md: KL against bits per weight, and bits by expert.

`python docs/site/plots.py` measures the checkpoint that ships with lfmc on the passages that ship
with it, and writes docs/plots/*.svg. It takes a few minutes on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.calib_free.allocate.budget import Budget
from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import make_plan
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.planned_tensors import dequantized_weights
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import InputError
from lfmc.machine.cache import default_cache
from lfmc.parity.text_quality import QualityMeter, logits_of
from lfmc.report import heat_map as heat
from lfmc.report.page import templates
from lfmc.report.plan_facts import tensor_facts
from lfmc.report.plot import Line, Mark, Plot, Point, axes
from lfmc.verification.rungs import WINDOW, WINDOWS, read_passages

FOLDER = Path(__file__).parents[1] / "plots"
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.5, 6.5)
METHODS = {"auto": "one", "alphaq": "three", "uniform": "two"}
LABELLED = {"auto": 0, "alphaq": -1, "uniform": 0}  # the index of the labelled point of each line
EXPERTS_AT = 3.5
STYLE = """
.paper { fill: #fff; } .grid { stroke: #d9dee4; } .float { fill: #c9ced6; }
text { font: 12px system-ui, sans-serif; fill: #1b1f24; } .axis, .tick text { fill: #5d6672; }
path { fill: none; stroke-width: 2; }
.l-one { stroke: #1f63b5; } .m-one { fill: #1f63b5; }
.l-two { stroke: #c2571a; stroke-dasharray: 6 4; } .m-two { fill: #c2571a; }
.l-three { stroke: #2b8a3e; stroke-dasharray: 2 3; } .m-three { fill: #2b8a3e; }
"""


def main() -> None:
    """Measure all plans and write the plots."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint()
    tokens = read_passages(checkpoint, WINDOW, WINDOWS["full"])
    points: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    FOLDER.mkdir(exist_ok=True)
    for bits in BUDGETS:
        for method in METHODS:
            try:
                plan = plan_of(checkpoint, method, bits)
            except InputError as error:
                print(f"{method} at {bits}: {error.what}")
                continue
            kl = measure_kl(checkpoint, tokens, plan)
            print(f"{method} at {bits}: {plan.bits_per_weight:.3f} bits per weight, KL {kl:.4f}")
            points[method].append((plan.bits_per_weight, kl))
            if bits == EXPERTS_AT and method != "uniform":
                write(f"experts-{method}.svg", "heat_map", experts(plan))
    series = [
        Series(name, METHODS[name], tuple(points[name]), name, LABELLED[name]) for name in METHODS
    ]
    title = "KL against bits per weight, for auto, alphaq and uniform"
    y_label = "KL to the float32 model, nats a token, measured"
    write("kl.svg", "plot", kl_plot(series, title, y_label, (560, 340), 3.5))


def plan_of(checkpoint: Checkpoint, method: str, bits: float) -> BitPlan:
    resources = Resources(cache=default_cache())
    budget = Budget(bits)
    return make_plan(checkpoint, GENERIC, method, budget, target="generic", resources=resources)


def measure_kl(checkpoint: Checkpoint, tokens: Tensor, plan: BitPlan) -> float:
    """Return KL(float32 || quantized) on windows of text, in nats per token."""
    meter = QualityMeter()
    weights = dequantized_weights(checkpoint, plan)
    with torch.inference_mode():
        reference, quantized = (
            logits_of(d, tokens) for d in (checkpoint.decoder(), checkpoint.decoder(weights))
        )
        for expected, actual, batch in zip(reference, quantized, tokens.split(8), strict=True):
            meter.add(expected, actual, batch)
    return meter.result().kl


@dataclass(frozen=True)
class Series:
    """Points `(bits per weight, KL)` of one method; `label` stands beside point `labelled`."""

    name: str
    style: str
    points: tuple[Point, ...]
    label: str
    labelled: int = 0
    line: bool = True
    above: bool = False


def kl_plot(
    series: Sequence[Series], title: str, y_label: str, size: tuple[int, int], radius: float
) -> Plot:
    """Plot KL against bits per weight: a mark for every point, a line for the methods that vary."""
    all_points = [point for each in series for point in each.points]
    x, y = axes(
        ([p[0] for p in all_points], [p[1] for p in all_points]),
        ("bits per weight, every byte counted", y_label),
        size=size,
        log=(False, True),
    )
    lines = tuple(Line(each.points, each.style, each.name) for each in series if each.line)
    marks = tuple(
        Mark(
            point,
            radius,
            each.style,
            f"{each.name}: {point[0]:.3f} bits per weight, KL {point[1]:.4f}",
            each.label if index == each.labelled % len(each.points) else "",
            above=each.above,
        )
        for each in series
        for index, point in enumerate(each.points)
    )
    return Plot(title, *size, x, y, lines, marks)


def experts(plan: BitPlan) -> heat.HeatMap:
    """Return the heat map of the bits per weight of every expert."""
    heat_map = heat.expert_map(list(map(tensor_facts, plan.rows)))
    assert heat_map is not None
    return heat_map


def write(name: str, macro: str, plot: Any) -> None:
    """Draw a plot with a macro of the HTML pages; write it as SVG on white, with its style."""
    source = f"{{% from 'parts.html' import {macro} %}}{{{{ {macro}(figure) }}}}"
    text = templates().from_string(source).render(figure=plot).strip()
    text = text.removeprefix('<div class="scroll">').removesuffix("</div>").strip()
    shades = enumerate(heat.colours(heat.LIGHT))
    style = STYLE + "".join(
        f"rect.s{i} {{ fill: {fill}; }} text.s{i} {{ fill: {ink}; }}\n" for i, (fill, ink) in shades
    )
    head, _, rest = text.partition(">")
    if "viewBox" not in head:
        head += f' viewBox="0 0 {plot.width} {plot.height}"'
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    paper = '<rect class="paper" width="100%" height="100%"/>'
    (FOLDER / name).write_text(f"{head}>\n<style>{style}</style>{paper}{rest}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
