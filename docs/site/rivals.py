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

from plots import FOLDER, Series, kl_plot, write

# Method: how its series is drawn. Q4_0 and HQQ with 4 bits are next to each other: one label.
METHODS = {
    "auto": {"name": "lfmc", "style": "two", "label": "lfmc"},
    "auto:best": {
        "name": "lfmc --effort best",
        "style": "one",
        "label": "lfmc --effort best",
        "labelled": 1,
    },
    "q4_0": {"name": "Q4_0 (llama.cpp)", "label": "Q4_0 (llama.cpp), HQQ 4 bit"},
    "hqq4": {"name": "HQQ 4 bit", "label": ""},
    "hqq3": {"name": "HQQ 3 bit", "label": "HQQ 3 bit"},
    "hqq2": {"name": "HQQ 2 bit", "label": "HQQ 2 bit"},
}
RIVAL = {"style": "three", "line": False, "above": True}


def main() -> None:
    """Draw the picture."""
    rows = json.loads((FOLDER / "rivals.json").read_text(encoding="utf-8"))
    series = []
    for method, drawing in METHODS.items():
        measured = [row for row in rows if row["method"] == method]
        points = tuple((row["bits_per_weight"], row["quality"]["kl"]) for row in measured)
        look = drawing if "style" in drawing else RIVAL | drawing
        series.append(Series(points=points, **look))
    title = "KL divergence against bits per weight, for lfmc and other quantizers"
    y_label = "KL from the float32 model, nats per token"
    write("rivals.svg", "plot", kl_plot(series, title, y_label, (720, 380), 4))


if __name__ == "__main__":
    main()
