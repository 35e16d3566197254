"""Where a tensor stands in the model, and what people call the part it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDING, CONV, ATTENTION = "embedding and head", "short conv projections", "attention projections"
FEED_FORWARD, EXPERTS, FLOATS = "feed-forward", "experts", "norms, convs, routers (float)"
GROUPS = (EMBEDDING, CONV, ATTENTION, FEED_FORWARD, EXPERTS, FLOATS)


@dataclass(frozen=True)
class Place:
    """`kind` is the part of a layer, such as `conv.in_proj` or `experts.w1`.

    `layer` is None outside the layers, `expert` outside experts.
    """

    kind: str
    layer: int | None = None
    expert: int | None = None


def place(name: str) -> Place:
    """The place of a tensor, by its name on disk."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] != ["model", "layers"]:
        return Place(parts[-1])
    layer, inner = int(parts[2]), parts[3:]
    if inner[:2] == ["feed_forward", "experts"]:
        return Place("experts." + ".".join(inner[3:]), layer, int(inner[2]))
    return Place(".".join(inner), layer)


def group(name: str, role: str) -> str:
    """One of `GROUPS`, for a tensor of a role of `lfmc.calib_free.plan.roles`."""
    if role in ("embedding", "head"):
        return EMBEDDING
    if role == "expert":
        return EXPERTS
    if role != "linear":
        return FLOATS
    block = place(name).kind.split(".")[0]
    return {"conv": CONV, "self_attn": ATTENTION}.get(block, FEED_FORWARD)
