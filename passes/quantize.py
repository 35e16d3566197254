"""Replaces a float weight by codes, scales and zero points; used by both quantize passes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.errors import InputError
from lfmc.graph.program import Part, Program, Weight

Formats = Mapping[str, Format | Floats]


def planned_format(program: Program, node: object, formats: Formats) -> Format | None:
    """Return the format of a weight node in the plan, or None if the weight stays float.

    Raise `InputError` if tensors that are merged into one matmul have different formats.
    """
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    weight = program.weights[str(node.target)]
    if weight.part != "values":
        return None
    formats_by_source = {name: formats[name] for name in weight.sources}
    if len(set(formats_by_source.values())) > 1:
        raise InputError(
            "tensors that are merged into one matmul have different formats in the plan",
            where=", ".join(formats_by_source),
            expected="one format",
            got=", ".join(f.name for f in formats_by_source.values()),
            todo="give them the same format, or create a new plan",
        )
    number_format = next(iter(formats_by_source.values()))
    return number_format if isinstance(number_format, Format) else None


def add_parts(program: Program, node: fx.Node, format: Format) -> tuple[fx.Node | None, ...]:
    """Add nodes for the codes, scales and zero points (None if symmetric) of a weight node.

    Codes are uint8 `[N, ceil(G * group * bits / 8)]`, scales `[N, G]`, zero points uint8 `[N, G]`.
    For a palette, codes are `[N, ceil(K * bits / 8)]` and the scales are tables `[N, 2^bits]`.
    """
    value, base = node.meta["val"], str(node.target).removesuffix(".weight")
    rows, columns = value.shape
    groups = format.groups_per_row(columns)
    sources = program.weights[str(node.target)].sources
    code_bytes = -(-format.codes_per_row(columns) * format.bits // 8)
    shapes: dict[Part, tuple[int, torch.dtype]] = {
        "codes": (code_bytes, torch.uint8),
        "scales": (groups, getattr(torch, format.scale_dtype)),
        "zeros": (groups, torch.uint8),
    }
    parts: list[fx.Node | None] = []
    for part, (width, dtype) in shapes.items():
        if part == "zeros" and format.symmetric:
            parts.append(None)
            continue
        name = f"{base}.{part}"
        if name in program.weights:  # a tied head uses the parts of the embedding
            parts.append(next(n for n in program.graph.nodes if n.target == name))
            continue
        fake = value.new_empty((rows, width), dtype=dtype)
        parts.append(program.add_weight(name, Weight(sources, part), fake))
    return tuple(parts)
