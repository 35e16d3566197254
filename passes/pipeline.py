"""The one ordered list of passes, with the reason for each position."""

from __future__ import annotations

from lfmc.passes.base import Pass
from lfmc.passes.fuse_attention import FuseAttention
from lfmc.passes.fuse_gated_short_conv import FuseGatedShortConv
from lfmc.passes.fuse_rms_norm import FuseRmsNorm
from lfmc.passes.fuse_swiglu import FuseSwiglu
from lfmc.passes.merge_projections import MergeProjections
from lfmc.passes.quantize import Formats
from lfmc.passes.quantize_embedding import QuantizeEmbedding
from lfmc.passes.quantize_linears import QuantizeLinears
from lfmc.passes.remove_dead_code import RemoveDeadCode
from lfmc.passes.remove_no_ops import RemoveNoOps
from lfmc.passes.route_experts import RouteExperts


def fusion(*, merge: bool = True) -> list[Pass]:
    """Return the passes that fuse a traced graph into `lfm::` operators; weights stay float."""
    passes: list[Pass] = [
        RemoveNoOps(),  # first: the patterns below contain no casts and copies
        FuseRmsNorm(),  # before attention, whose pattern contains the q and k norms
        FuseGatedShortConv(),  # needs only RemoveNoOps
        FuseAttention(),  # after the norms
        FuseSwiglu(),  # before the experts, whose pattern contains it
        RouteExperts(),  # before merging: an expert's w1 and w3 keep separate formats
    ]
    if merge:
        passes.append(MergeProjections())  # last: it merges the inputs of fused operators
    return passes


def pipeline(formats: Formats, *, merge: bool = True) -> list[Pass]:
    """Return all passes from a traced decoder to a program in the formats of a plan.

    `formats` maps every tensor of the checkpoint to its format. With `merge=False`, projections
    stay separate, for a target that does not benefit from one large matmul.
    """
    return [
        *fusion(merge=merge),
        QuantizeEmbedding(formats),  # before linears, as in the graph; the order is free
        QuantizeLinears(formats),  # after merging: a merged weight is one tensor
        RemoveDeadCode(),  # last: removes nodes and constants that are no longer read
    ]
