"""A decoder with one matrix in memory at a time, for models larger than the machine's memory.

Every large matrix is read for each product, forward and again backward, and then released. Norms,
filters, routers and biases stay in memory. The backward pass runs each layer again from its input,
so only hidden states are stored between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lfmc.calib_free.plan.roles import EMBEDDING, HEAD, QUANTIZED_ROLES, tensor_role
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.weight_files import read_tensor
from lfmc.model import build_decoder, initial_state
from lfmc.model.config import CONV
from lfmc.model.decoder import attention_inputs
from lfmc.model.experts import SparseMoe

# Called in the backward pass with the name of a matrix `[N, K]`, its inputs `[n, K]`, the gradients
# `[n, N]` of its outputs, and the positions of the inputs among the `B T` tokens, int64 `[n]`,
# ascending.
# `n` is 0 for an expert that no token chose.
Observe = Callable[[str, Tensor, Tensor, Tensor], None]

# Called with the number of layers below a hidden state, and the hidden state `[B, T, H]`.
Record = Callable[[int, Tensor], None]

CHUNK = 1 << 23  # logits in memory at a time
RESIDENT_NBYTES = 384 << 20  # of matrices that stay in memory: a small model is read once


def matmul_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device multiplies it natively (much faster), else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


class StreamedDecoder:
    """The decoder of a checkpoint, run layer by layer on a device.

    Hidden states are float32 `[B, T, H]`; products use `matmul_dtype`, sums float32.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.config = checkpoint.config
        self.device = torch.device(device)
        self.dtype = matmul_dtype(self.device)
        self.observe: Observe | None = None
        self.rows: Tensor | None = None  # tokens of the expert that runs; None: all tokens
        self.checkpoint = checkpoint
        self._checked: set[str] = set()  # matrices without NaN or infinity
        self._resident: dict[str, Tensor] = {}  # the first matrices, up to `RESIDENT_NBYTES`
        self._free_nbytes = RESIDENT_NBYTES
        self._head_name = EMBEDDING if self.config.tied_embedding else HEAD
        self._decoder = build_decoder(self.config)
        small = {n: v for n, v in self._decoder.state_dict().items() if n.startswith("rope.")}
        large = set()
        for name, info in checkpoint.tensors.items():
            if tensor_role(name, info.shape) in QUANTIZED_ROLES:
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
        """Return the hidden states before the first layer for `tokens` `[B, T]`, int64."""
        rows: Tensor = self.read(EMBEDDING)[tokens]
        return rows.float()

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        states: Sequence[Tensor],
        record: Record = lambda index, x: None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the head's input `[B, T, H]` and the new states, like `Decoder.hidden`.

        `record` receives the input of each layer, and the output of the last one.
        """
        x, new_states = self.embed(tokens), list[Tensor]()
        for index, kind in enumerate(self.config.layer_types):
            record(index, x)
            first = len(new_states)
            layer_states = states[first : first + (1 if kind == CONV else 2)]
            x, layer_states = self._run(index, x, positions, layer_states)
            new_states += layer_states
        record(self.config.num_layers, x)
        return self.normalized(x), tuple(new_states)

    def layer(self, index: int, x: Tensor) -> Tensor:
        """Return the hidden states after one layer, for texts that begin at position 0."""
        count, length, _ = x.shape
        states = initial_state(self.config, count, length, self.device, index)
        return self._run(index, x, torch.arange(length, device=self.device), states)[0]

    def _run(
        self, index: int, x: Tensor, positions: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        context = states[0].shape[2]  # of attention; convolutions do not use it
        frequencies = self._decoder.rope.get_buffer
        attention = attention_inputs(self.config, positions, context, frequencies)
        kind = self.config.layer_types[index]
        y, new_states = self._decoder.model.layers[index](x, attention.get(kind, ()), states)
        return y, list(new_states)

    def layer_backward(
        self, index: int, x: Tensor, gradient: Tensor, observe: Observe | None = None
    ) -> Tensor:
        """Return the gradient of a layer's input `x` from that of its output; both `[B, T, H]`."""
        x = x.detach().requires_grad_(True)
        self.observe = observe
        try:
            with torch.enable_grad():
                torch.autograd.backward(self.layer(index, x), gradient)
        finally:
            self.observe = None
        return torch.zeros_like(x) if x.grad is None else x.grad

    def normalized(self, x: Tensor) -> Tensor:
        """Return the head's input `[B, T, H]` for hidden states after the last layer."""
        y: Tensor = self._decoder.model.embedding_norm(x)
        return y

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield logits float32 `[b, T, V]` of the head's inputs `[B, T, H]`, some texts at a time.

        Each item is the slice of the B texts, their logits, and the head `[V, H]` in `self.dtype`.
        """
        head = self.read(self._head_name)
        step = max(1, CHUNK // (len(head) * hidden.shape[1]))
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            yield part, (hidden[part].to(self.dtype) @ head.T).float(), head

    def head_rows(self, rows: Tensor) -> Tensor:
        """Return some rows of the head, float32 `[R, H]`."""
        head: Tensor = self.checkpoint.load(self._head_name)[rows.cpu()]
        return head.float().to(self.device)

    def read(self, name: str) -> Tensor:
        """Return a matrix in the dtype of products. Raises `InputError` if it is not finite."""
        if (resident := self._resident.get(name)) is not None:
            return resident
        if name in self._checked:
            return read_tensor(self.checkpoint.tensors[name]).to(self.device, self.dtype)
        self._checked.add(name)
        matrix = self.checkpoint.load(name).to(self.device, self.dtype)
        if matrix.nbytes <= self._free_nbytes:
            self._free_nbytes -= matrix.nbytes
            self._resident[name] = matrix.clone() if self._is_mapped(name) else matrix
        return matrix

    def _is_mapped(self, name: str) -> bool:
        """Return whether `read` returns a view of the file, which would keep all of it mapped."""
        return self.device.type == "cpu" and self.checkpoint.tensors[name].dtype == self.dtype


class _Product(torch.autograd.Function):
    """`x W'` with a matrix that is read again for the backward pass instead of stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: _Matrix) -> Tensor:
        inputs = x.to(matrix.decoder.dtype)
        ctx.save_for_backward(inputs)
        ctx.matrix, ctx.rows = matrix, matrix.decoder.rows
        product = torch.nn.functional.linear(inputs, matrix.decoder.read(matrix.name))
        return product.float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        matrix: _Matrix = ctx.matrix
        # Flatten before the product: with three dims, torch may copy the matrix once per text.
        flat, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        rows = torch.arange(len(flat), device=flat.device) if ctx.rows is None else ctx.rows
        if matrix.decoder.observe is not None:
            matrix.decoder.observe(matrix.name, flat, gradient, rows)
        product = gradient.to(x.dtype) @ matrix.decoder.read(matrix.name)
        return product.float().view(x.shape), None


class _Matrix(nn.Module):
    """Replaces an `nn.Linear`: its bias, and the name of its matrix."""

    def __init__(self, name: str, bias: nn.Parameter | None, decoder: StreamedDecoder) -> None:
        super().__init__()
        self.name, self.decoder, self.bias = name, decoder, bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Experts(nn.Module):
    """Replaces a `SparseMoe`: also stores in `decoder.rows` which tokens the expert receives."""

    def __init__(self, experts: SparseMoe, decoder: StreamedDecoder) -> None:
        super().__init__()
        self.inner, self.decoder = experts, decoder

    def forward(self, x: Tensor) -> Tensor:
        def set_rows(rows: Tensor) -> None:
            self.decoder.rows = rows

        y = self.inner.run_chosen(x.flatten(0, 1), set_rows)
        self.decoder.rows = None
        return y.view_as(x)
