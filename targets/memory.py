"""The memory of an export without parity, in bytes, from the configuration of a model.

`python tests/benchmarks/whole.py --shapes 350m,1.2b -- --bits 4 --check off` measures it.
"""

from __future__ import annotations

from math import prod

from lfmc.model import DecoderConfig
from lfmc.model.tensor_shapes import tensor_shapes

LIBRARIES = 1 << 30  # torch, the libraries of a target, the traced program, a compiler
# Bytes for each weight of the largest constant that a target writes at once.
PER_WEIGHT = {False: 8, True: 12}  # by whether matrices stay float


def streamed_nbytes(config: DecoderConfig, *, is_float: bool) -> int:
    """Return the memory of a target that writes one constant at a time.

    The largest constant is the embedding, or the matrices w1 and w3 of all experts of a layer.
    """
    largest = config.vocab_size * config.hidden_size
    if config.moe is not None:
        moe = config.moe
        largest = max(largest, 2 * moe.num_experts * moe.ffn_size * config.hidden_size)
    return LIBRARIES + PER_WEIGHT[is_float] * largest


def whole_nbytes(config: DecoderConfig, bytes_per_param: float, *, is_float: bool) -> int:
    """Return the memory of a library that holds the whole model; floats take twice as much."""
    params = sum(map(prod, tensor_shapes(config).values()))
    return int(bytes_per_param * (2 if is_float else 1) * params)
