"""The importance of each input channel of a matrix, from the weights alone.

The input of a projection after an RMSNorm is `gain * n`, where `n` has unit mean square. The second
moment of channel k is therefore about `gain_k^2`, which is the cost of an error in column k.
"""

from __future__ import annotations

import re

from torch import Tensor

from lfmc.calib_free.plan.roles import EMBEDDING, HEAD
from lfmc.checkpoint.checkpoint import Checkpoint

_OPERATOR_INPUTS = re.compile(
    r"(model\.layers\.\d+)\.(self_attn\.(q|k|v|gate)_proj|conv\.in_proj)\.weight"
)
_FFN_INPUTS = re.compile(
    r"(model\.layers\.\d+)\.feed_forward\.((experts\.\d+\.)?w[13]|gate)\.weight"
)


def input_gain_name(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the name of the RMSNorm weight directly before matrix `name`, or None.

    A tied embedding counts as the head.
    """
    if match := _OPERATOR_INPUTS.fullmatch(name):
        return f"{match.group(1)}.operator_norm.weight"
    if match := _FFN_INPUTS.fullmatch(name):
        return f"{match.group(1)}.ffn_norm.weight"
    if name == HEAD or (name == EMBEDDING and checkpoint.config.tied_embedding):
        return "model.embedding_norm.weight"
    return None


def input_importance(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Return the importance of each input channel of matrix `name`: the squared norm gain.

    float32 `[K]`; None if there is no norm before the matrix: all channels count the same.
    """
    gain = input_gain_name(checkpoint, name)
    return None if gain is None else checkpoint.load(gain).float().square()
