"""Draws docs/plots/rivals.svg, the picture of the README: KL against size, lfmc and others.

The numbers come from docs/plots/rivals.json, which the first command measures on the checkpoint
that ships with lfmc: an hour on two cores, most of it `auto:best`; five minutes with `--cache
--device cuda` on a machine with a GPU.

    python tests/benchmarks/quality.py --rivals q4_0,hqq4,hqq3,hqq2 --methods auto,auto:best \\
        --bits 2.5,3,3.5,4,4.5 --json docs/plots/rivals.json
    python docs/site/rivals.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from plots import FOLDER, write

from lfmc.report.plot import Line, Mark, Plot, axes

SIZE = (720, 380)
METHODS = {"auto": ("lfmc", "two"), "auto:best": ("lfmc --effort best", "one")}
RIVALS = {
    "q4_0": "Q4_0 (llama.cpp)",
    "hqq4": "HQQ 4 bit",
    "hqq3": "HQQ 3 bit",
    "hqq2": "HQQ 2 bit",
}
# Method, index of a point: the label beside it. Q4_0 and HQQ with 4 bits are next to each other.
LABELS = {
    ("auto", 0): "lfmc",
    ("auto:best", 1): "lfmc --effort best",
    ("q4_0", 0): "Q4_0 (llama.cpp), HQQ 4 bit",
    ("hqq3", 0): "HQQ 3 bit",
    ("hqq2", 0): "HQQ 2 bit",
}
Point = tuple[float, float]


def main() -> None:
    """Draw the picture."""
    rows = json.loads((FOLDER / "rivals.json").read_text(encoding="utf-8"))
    write("rivals.svg", "plot", rivals_plot(rows))


def rivals_plot(rows: Sequence[Mapping[str, Any]]) -> Plot:
    """Return the plot: a line for each effort of lfmc, a point for each rival."""
    points: dict[str, list[Point]] = {}
    for row in rows:
        point = (row["bits_per_weight"], row["quality"]["kl"])
        points.setdefault(row["method"], []).append(point)
    all_points = [point for method_points in points.values() for point in method_points]
    x, y = axes(
        ([point[0] for point in all_points], [point[1] for point in all_points]),
        ("bits per weight, every byte counted", "KL from the float32 model, nats per token"),
        size=SIZE,
        log=(False, True),
    )
    lines = [Line(tuple(points[method]), look, label) for method, (label, look) in METHODS.items()]
    marks = []
    for method, method_points in points.items():
        label, look = METHODS.get(method) or (RIVALS[method], "three")
        for index, point in enumerate(method_points):
            title = f"{label}: {point[0]:.3f} bits per weight, KL {point[1]:.4f}"
            text = LABELS.get((method, index), "")
            marks.append(Mark(point, 4, look, title, text, above=method in RIVALS))
    title = "KL divergence against bits per weight, for lfmc and other quantizers"
    return Plot(title, *SIZE, x, y, tuple(lines), tuple(marks))


if __name__ == "__main__":
    main()
