"""The decoder with one matrix in memory at a time: for models larger than the machine's memory.

Every large matrix is read where it is multiplied with, forward and again backward, and let go.
What stays is what is small: norms, filters, routers and biases. A layer's Jacobian is applied by
running the layer again from its input, so between layers only hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfmc.calib_free.plan.roles import EMBEDDING, HEAD, QUANTIZED, role
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import read_tensor
from lfmc.model import build_decoder, initial_state
from lfmc.model.config import CONV
from lfmc.model.decoder import attention_inputs
from lfmc.model.experts import SparseMoe

Observe = Callable[[str, Tensor, Tensor, Tensor], None]
# Told, in the backward pass, the name of a matrix `[N, K]`, its inputs `[n, K]`, the gradients
# `[n, N]` at its outputs, and which of the `B T` tokens these are, int64 `[n]`, rising; `n` may be
# 0, where no token chose an expert.

CHUNK = 1 << 23  # logits in memory at a time
HELD_NBYTES = 384 << 20  # of matrices that stay: a small model is read once


def matmul_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (several times as fast), else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


class StreamedDecoder:
    """The decoder of a checkpoint, run layer by layer on a device.

    Hidden states are float32 `[B, T, H]`; products are made in `matmul_dtype`, sums in float32.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.config = checkpoint.config
        self.device = torch.device(device)
        self.dtype = matmul_dtype(self.device)
        self.observe: Observe | None = None
        self.rows: Tensor | None = None  # tokens of the expert that runs; None: all of them
        self.checkpoint = checkpoint
        self._checked: set[str] = set()  # read once, and found finite
        self._held: dict[str, Tensor] = {}  # what was read first, as far as there is room
        self._room = HELD_NBYTES
        self._head_name = EMBEDDING if self.config.tied_embedding else HEAD
        self._decoder = build_decoder(self.config)
        small = {n: v for n, v in self._decoder.state_dict().items() if n.startswith("rope.")}
        large = set()
        for name, info in checkpoint.tensors.items():
            if role(name, info.shape) in QUANTIZED:
                large.add(name.removesuffix(".weight"))
            else:
                small[name] = checkpoint.load(name).float()
        small = {name: value.to(self.device) for name, value in small.items()}
        self._decoder.load_state_dict(small, strict=False, assign=True)
        self._decoder.requires_grad_(False)
        for path, module in list(self._decoder.named_modules()):
            if path in large and isinstance(module, nn.Linear):
                self._replace(path, _Matrix(f"{path}.weight", module.bias, self))
        for path, module in list(self._decoder.named_modules()):
            if isinstance(module, SparseMoe):
                self._replace(path, _Experts(module, self))

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, leaf = path.rpartition(".")
        setattr(self._decoder.get_submodule(parent), leaf, module)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states before the first layer for `tokens` `[B, T]`, int64."""
        rows: Tensor = self.read(EMBEDDING)[tokens]
        return rows.float()

    def hidden(
        self, tokens: Tensor, positions: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The head's input `[B, T, H]` and new states, as `Decoder.hidden` has them."""
        x, new = self.embed(tokens), list[Tensor]()
        for index, kind in enumerate(self.config.layer_types):
            own = states[len(new) : len(new) + (1 if kind == CONV else 2)]
            x, own = self._run(index, x, positions, own)
            new += own
        return self.normalized(x), tuple(new)

    def layer(self, index: int, x: Tensor) -> Tensor:
        """Hidden states after one layer, of texts that begin at position 0."""
        count, length, _ = x.shape
        states = initial_state(self.config, count, length, self.device, index)
        return self._run(index, x, torch.arange(length, device=self.device), states)[0]

    def _run(
        self, index: int, x: Tensor, positions: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        context = states[0].shape[2]  # of attention; a convolution does not ask
        frequencies = self._decoder.rope.get_buffer
        attention = attention_inputs(self.config, positions, context, frequencies)
        kind = self.config.layer_types[index]
        y, new = self._decoder.model.layers[index](x, attention.get(kind, ()), states)
        return y, list(new)

    def layer_backward(
        self, index: int, x: Tensor, gradient: Tensor, observe: Observe | None = None
    ) -> Tensor:
        """The gradient at a layer's input `x`, given the one at its output; both `[B, T, H]`."""
        x = x.detach().requires_grad_(True)
        self.observe = observe
        try:
            with torch.enable_grad():
                torch.autograd.backward(self.layer(index, x), gradient)
        finally:
            self.observe = None
        return torch.zeros_like(x) if x.grad is None else x.grad

    def normalized(self, x: Tensor) -> Tensor:
        """The head's input `[B, T, H]` for hidden states after the last layer."""
        y: Tensor = self._decoder.model.embedding_norm(x)
        return y

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Logits float32 `[b, T, V]` of the head's inputs `[B, T, H]`, some texts at a time.

        With each part: which of the B texts they are, and the head `[V, H]` as it multiplies.
        """
        head = self.read(self._head_name)
        step = max(1, CHUNK // (len(head) * hidden.shape[1]))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            yield part, (hidden[part].to(self.dtype) @ head.T).float(), head

    def head_rows(self, rows: Tensor) -> Tensor:
        """Some rows of the head, float32 `[R, H]`."""
        head: Tensor = self.checkpoint.load(self._head_name)[rows.cpu()]
        return head.float().to(self.device)

    def read(self, name: str) -> Tensor:
        """A matrix in the dtype that products are made in; `InputError` where it holds NaN."""
        if (held := self._held.get(name)) is not None:
            return held
        if name in self._checked:
            return read_tensor(self.checkpoint.tensors[name]).to(self.device, self.dtype)
        self._checked.add(name)
        matrix = self.checkpoint.load(name).to(self.device, self.dtype)
        if matrix.nbytes <= self._room:
            self._room -= matrix.nbytes
            self._held[name] = matrix.clone() if self._mapped(name) else matrix
        return matrix

    def _mapped(self, name: str) -> bool:
        """Whether `read` gives a view of the file, which would keep all of it mapped."""
        return self.device.type == "cpu" and self.checkpoint.tensors[name].dtype == self.dtype


class _Product(torch.autograd.Function):
    """`x W'` with a matrix that is read when it is needed, and not kept in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: _Matrix) -> Tensor:
        narrow = x.to(matrix.decoder.dtype)
        ctx.save_for_backward(narrow)
        ctx.matrix, ctx.rows = matrix, matrix.decoder.rows
        product = torch.nn.functional.linear(narrow, matrix.decoder.read(matrix.name))
        return product.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        matrix: _Matrix = ctx.matrix
        # Flat before they are multiplied: of three dims, torch may copy the matrix once a text.
        flat, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        rows = torch.arange(len(flat), device=flat.device) if ctx.rows is None else ctx.rows
        if matrix.decoder.observe is not None:
            matrix.decoder.observe(matrix.name, flat, gradient, rows)
        product = gradient.to(x.dtype) @ matrix.decoder.read(matrix.name)
        return product.float().view(x.shape), None


class _Matrix(nn.Module):
    """In place of an `nn.Linear`: its bias, and the name of its matrix."""

    def __init__(self, name: str, bias: nn.Parameter | None, decoder: StreamedDecoder) -> None:
        super().__init__()
        self.name, self.decoder, self.bias = name, decoder, bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Experts(nn.Module):
    """In place of a `SparseMoe`: the same, telling the decoder which tokens an expert sees."""

    def __init__(self, experts: SparseMoe, decoder: StreamedDecoder) -> None:
        super().__init__()
        self.inner, self.decoder = experts, decoder

    def forward(self, x: Tensor) -> Tensor:
        def tell(rows: Tensor) -> None:
            self.decoder.rows = rows

        y = self.inner.run_chosen(x.flatten(0, 1), tell)
        self.decoder.rows = None
        return y.view_as(x)
