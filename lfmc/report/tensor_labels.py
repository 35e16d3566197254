"""Labels of a tensor: its place in the model and the group that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDING, CONV, ATTENTION = "embedding and head", "short conv projections", "attention projections"
FEED_FORWARD, EXPERTS, FLOATS = "feed-forward", "experts", "norms, convs, routers (float)"
GROUPS = (EMBEDDING, CONV, ATTENTION, FEED_FORWARD, EXPERTS, FLOATS)


@dataclass(frozen=True)
class Place:
    """The place of a tensor in the model.

    `kind` is a part of a layer, such as `conv.in_proj` or `experts.w1`. `layer` is None outside
    the layers; `expert` is None outside the experts.
    """

    kind: str
    layer: int | None = None
    expert: int | None = None


def place(name: str) -> Place:
    """Return the place of a tensor from its name in the checkpoint."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] != ["model", "layers"]:
        return Place(parts[-1])
    layer, path = int(parts[2]), parts[3:]
    if path[:2] == ["feed_forward", "experts"]:
        return Place("experts." + ".".join(path[3:]), layer, int(path[2]))
    return Place(".".join(path), layer)


def group(name: str, role: str) -> str:
    """Return the group (one of `GROUPS`) of a tensor; `role` is from `calib_free.plan.roles`."""
    if role in ("embedding", "head"):
        return EMBEDDING
    if role == "expert":
        return EXPERTS
    if role != "linear":
        return FLOATS
    block = place(name).kind.split(".")[0]
    return {"conv": CONV, "self_attn": ATTENTION}.get(block, FEED_FORWARD)
