"""The page about a checkpoint: layers, parameters, and memory by context."""

from __future__ import annotations

from lfmc.report.model_facts import ModelFacts
from lfmc.report.page import render
from lfmc.report.plot import FULL_WIDTH, HALF_WIDTH, Line, Mark, Plot, axes, format_tick
from lfmc.report.units import MIB, percent, short_length, size


def model_page(facts: ModelFacts) -> str:
    """Return a self-contained HTML page."""
    last = facts.curve[-1]
    states, estimate = last.attention + last.conv, last.all_attention
    roles = sorted(facts.roles.items(), key=lambda item: -item[1])
    return render(
        "model.html",
        facts=facts,
        config=facts.config,
        head=_head(facts),
        memory=memory_plot(facts, HALF_WIDTH),
        memory_wide=memory_plot(facts, FULL_WIDTH),
        roles=[(name, f"{n:,}", percent(n / facts.parameters)) for name, n in roles],
        last=last,
        states=states,
        share=percent(states / estimate),
    )


def memory_plot(facts: ModelFacts, frame: tuple[int, int]) -> Plot:
    """Plot MiB by context: weights, weights and states, and the all-attention estimate."""
    lines = (
        Line(
            tuple((f.context, f.all_attention_total / MIB) for f in facts.curve),
            "two",
            "attention in every layer (estimate)",
        ),
        Line(tuple((f.context, f.weights / MIB) for f in facts.curve), "other", "weights"),
        Line(tuple((f.context, f.total / MIB) for f in facts.curve), "one", "weights and states"),
    )
    values = [y for line in lines for _, y in line.points]
    x, y = axes(
        ([0.0, float(facts.curve[-1].context)], [0.0, *values]),
        ("context, tokens", "memory, MiB"),
        size=frame,
        log=(False, False),
        pad=(0.0, 0.0),
        formats=(short_length, format_tick),
        base=(1024, 10),
    )
    marks = tuple(
        Mark(
            (f.context, f.total / MIB),
            4,
            "one",
            f"{f.context:,} tokens: {size(f.total)}; estimate with attention in every layer: "
            f"{size(f.all_attention_total)}",
        )
        for f in facts.memory
    )
    return Plot("Memory against context length", *frame, x, y, lines, marks)


def _head(facts: ModelFacts) -> list[tuple[str, str]]:
    config = facts.config
    rows = [
        ("model", facts.name),
        ("type", config.model_type),
        ("parameters", f"{facts.parameters:,}"),
        ("weights as stored", size(facts.curve[0].weights)),
        ("layers", ", ".join(f"{n} {kind}" for kind, n in facts.layers.items())),
        ("longest context", f"{config.max_context:,} tokens"),
    ]
    if config.sliding_window:
        rows.append(("sliding window", f"{config.sliding_window:,} tokens"))
    if config.moe:
        moe = config.moe
        rows.append(("experts", f"{moe.num_experts} per sparse layer, {moe.top_k} per token"))
    return rows
