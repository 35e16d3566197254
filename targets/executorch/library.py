"""ExecuTorch and torchao, imported once, quietly, with the operators that lfmc's programs use."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from lfmc.quiet import quiet
from lfmc.targets.base import require

EXTRA = "executorch"


def load_operators() -> None:
    """Make `llama::` and `quantized_decomposed::` operators known, to torch and to the runtime.

    Raises `UnsupportedError` where a package is missing.
    """
    with quiet(), mute():
        require("torchao", EXTRA)
        require("executorch.extension.llm.custom_ops.custom_ops", EXTRA)
        require("executorch.exir.passes._quant_patterns_and_replacements", EXTRA)
        require("executorch.kernels.quantized", EXTRA)


def dynamic_int8_weight(codes: Tensor, scales: Tensor, bits: int, span: int) -> Tensor:
    """A weight for `F.linear` in the form that XNNPACK knows: signed codes `[N, K]` int8, scales
    `[N, G]` float32, one for each `span` columns; its input is rounded to int8, a scale a row."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    made: Tensor = IntxUnpackedToInt8Tensor(
        codes,
        scales,
        torch.zeros(scales.shape, dtype=torch.int8),
        getattr(torch, f"int{bits}"),
        (1, span),
        torch.float32,
        IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )
    return made


@contextlib.contextmanager
def mute() -> Iterator[None]:
    """Keep away what is written past Python's stderr: by the runtime's C++ at every call ("no temp
    allocator"), and by torch's own log."""
    sys.stderr.flush()
    own = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
