"""The plots of docs/allocation.md: KL against bits per weight, and bits by expert.

`python docs/site/plots.py` measures the checkpoint that ships with lfmc on the passages that do,
and writes docs/plots/*.svg; some minutes of one core.
"""

from __future__ import annotations

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
from lfmc.report.plot import Line, Mark, Plot, axes
from lfmc.verification.rungs import WINDOW, WINDOWS, passages

FOLDER = Path(__file__).parents[1] / "plots"
BUDGETS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.5, 6.5)
METHODS = {"auto": "one", "alphaq": "three", "uniform": "two"}
LABELLED = {"auto": 0, "alphaq": -1, "uniform": 0}  # the point of a line with its name
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
    """Measure, and write the plots."""
    torch.set_num_threads(1)
    checkpoint = open_checkpoint()
    tokens = passages(checkpoint, WINDOW, WINDOWS["full"])
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    FOLDER.mkdir(exist_ok=True)
    for bits in BUDGETS:
        for method in METHODS:
            try:
                plan = plan_of(checkpoint, method, bits)
            except InputError as error:
                print(f"{method} at {bits}: {error.what}")
                continue
            kl = measured(checkpoint, tokens, plan)
            print(f"{method} at {bits}: {plan.bits_per_weight:.3f} bits per weight, KL {kl:.4f}")
            found[method].append((plan.bits_per_weight, kl))
            if bits == EXPERTS_AT and method != "uniform":
                write(f"experts-{method}.svg", "heat_map", experts(plan))
    write("kl.svg", "plot", kl_plot(found))


def plan_of(checkpoint: Checkpoint, method: str, bits: float) -> BitPlan:
    resources = Resources(cache=default_cache())
    budget = Budget(bits)
    return make_plan(checkpoint, GENERIC, method, budget, target="generic", resources=resources)


def measured(checkpoint: Checkpoint, tokens: Tensor, plan: BitPlan) -> float:
    """KL(float32 || quantized) on windows of text, nats per token."""
    meter = QualityMeter()
    weights = dequantized_weights(checkpoint, plan)
    with torch.inference_mode():
        wide, narrow = (
            logits_of(d, tokens) for d in (checkpoint.decoder(), checkpoint.decoder(weights))
        )
        for ours, theirs, part in zip(wide, narrow, tokens.split(8), strict=True):
            meter.add(ours, theirs, part)
    return meter.result().kl


def kl_plot(found: dict[str, list[tuple[float, float]]]) -> Plot:
    every = [point for points in found.values() for point in points]
    size = (560, 340)
    x, y = axes(
        ([p[0] for p in every], [p[1] for p in every]),
        ("bits per weight, every byte counted", "KL to the float32 model, nats a token, measured"),
        size=size,
        log=(False, True),
    )
    lines = [Line(tuple(points), METHODS[name], name) for name, points in found.items()]
    named = {name: points[LABELLED[name]] for name, points in found.items()}
    marks = [
        Mark(
            point,
            3.5,
            METHODS[name],
            f"{name}: {point[0]:.3f} bits per weight, KL {point[1]:.4f}",
            name if point == named[name] else "",
        )
        for name, points in found.items()
        for point in points
    ]
    title = "KL against bits per weight, for auto, alphaq and uniform"
    return Plot(title, *size, x, y, tuple(lines), tuple(marks))


def experts(plan: BitPlan) -> heat.HeatMap:
    """Bits per weight of every expert."""
    found = heat.expert_map(list(map(tensor_facts, plan.rows)))
    assert found is not None
    return found


def write(name: str, macro: str, drawn: Any) -> None:
    """An SVG file of what a macro of the pages draws, on white paper, with its own style."""
    source = f"{{% from 'parts.html' import {macro} %}}{{{{ {macro}(drawn) }}}}"
    text = templates().from_string(source).render(drawn=drawn).strip()
    text = text.removeprefix('<div class="scroll">').removesuffix("</div>").strip()
    shades = enumerate(heat.colours(heat.LIGHT))
    style = STYLE + "".join(
        f"rect.s{i} {{ fill: {fill}; }} text.s{i} {{ fill: {ink}; }}\n" for i, (fill, ink) in shades
    )
    head, _, rest = text.partition(">")
    if "viewBox" not in head:
        head += f' viewBox="0 0 {drawn.width} {drawn.height}"'
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"')
    paper = '<rect class="paper" width="100%" height="100%"/>'
    (FOLDER / name).write_text(f"{head}>\n<style>{style}</style>{paper}{rest}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
