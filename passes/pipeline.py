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
    """Passes that find the structure of an LFM in a traced graph; weights stay as they are."""
    passes: list[Pass] = [
        RemoveNoOps(),  # first: every pattern below is written without casts and copies
        FuseRmsNorm(),  # before attention, whose pattern has the q and k norms in it
        FuseGatedShortConv(),  # needs only the graph without no-ops
        FuseAttention(),  # after the norms
        FuseSwiglu(),  # before the experts, whose pattern has it in it
        RouteExperts(),  # before merging: the experts' w1 and w3 stay apart, each with its bits
    ]
    if merge:
        passes.append(MergeProjections())  # after fusion: it merges what meets in one fused op
    return passes


def pipeline(formats: Formats, *, merge: bool = True) -> list[Pass]:
    """All passes from a traced decoder to a program in the formats of a plan.

    `formats` maps every tensor of the checkpoint to its format. Without `merge`, projections stay
    apart, for a target that gains nothing from one large matmul.
    """
    return [
        *fusion(merge=merge),
        QuantizeEmbedding(formats),  # before linears, only because the graph begins with it
        QuantizeLinears(formats),  # after merging: a merged weight is quantized as one
        RemoveDeadCode(),  # last: what the trace computed and nobody reads any more
    ]
