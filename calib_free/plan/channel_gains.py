"""How much each input channel of a matrix matters, as far as the weights alone tell.

The input of a projection that follows an RMSNorm is `gain * n` with `n` of unit mean square, so
the second moment of channel k is about `gain_k^2`: an error in column k costs that much.
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
    """The RMSNorm weight whose output is the input of matrix `name`; None where there is none.

    A tied embedding counts as the head that it also is.
    """
    if match := _OPERATOR_INPUTS.fullmatch(name):
        return f"{match.group(1)}.operator_norm.weight"
    if match := _FFN_INPUTS.fullmatch(name):
        return f"{match.group(1)}.ffn_norm.weight"
    if name == HEAD or (name == EMBEDDING and checkpoint.config.tied_embedding):
        return "model.embedding_norm.weight"
    return None


def input_importance(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Importance of each input channel of matrix `name`, float32 `[K]`: the squared norm gain.

    None where no norm feeds it: all channels count the same.
    """
    gain = input_gain_name(checkpoint, name)
    return None if gain is None else checkpoint.load(gain).float().square()
