"""The fused program as a torch module that holds its states: what is exported to ExecuTorch.

One Python function an operator, in a table; each computes with operators that the runtime has.
Activations are float32; n-bit matmuls round their input to int8, a scale a row, as the runtime's
kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lfmc.calib_free.pack import PackedTensor
from lfmc.errors import UnsupportedError
from lfmc.model import StateSpec
from lfmc.model.experts import choose_experts, mix_experts
from lfmc.model.rope import inverse_frequencies
from lfmc.passes.pattern import arguments
from lfmc.program import Program
from lfmc.targets.base import StoredTensor, find_handler
from lfmc.targets.executorch.library import dynamic_int8_weight
from lfmc.targets.executorch.stored import matrix_parts, stored
from lfmc.weights import PlannedWeights

Result = Any  # a tensor, several, or none
Made = tuple[Tensor, list[StoredTensor]]  # a constant, and what it holds of the checkpoint


class Stateful(nn.Module):
    """`forward(tokens [1, T] int64, start_pos [1] int64) -> logits [1, T, V] float32`.

    A conversation begins at position 0, where the filters' states of the one before it are not
    read. Keys and values need no reset: only slots up to the position are seen. Constants are
    made when `forward` first asks for them: call it once before it is exported.
    """

    def __init__(self, program: Program, weights: PlannedWeights, context: int) -> None:
        super().__init__()
        self.program, self.weights, self.context = program, weights, context
        self.tokens, self.positions, *states = (
            node for node in program.graph.nodes if node.op == "placeholder"
        )
        self.stored: list[StoredTensor] = []
        self.states = dict(zip(states, map(state_name, program.states), strict=True))
        for spec in program.states:
            self.register_buffer(state_name(spec), torch.zeros(state_shape(spec)))

    def forward(self, tokens: Tensor, start_pos: Tensor) -> Tensor:
        length, start = tokens.shape[1], start_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + length <= self.context)
        self.start: Any = start
        self.length = length
        self.begun = (start_pos != 0).to(torch.float32).view(1, 1, 1)
        positions = torch.arange(length) + start_pos
        values: dict[fx.Node, Result] = {self.tokens: tokens, self.positions: positions}
        self.results = values
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                values[node] = find_handler(HANDLERS, node, "ExecuTorch")(self, node)
            elif node.op == "output":
                logits: Tensor = values[arguments(node)[0][0]]
        return logits

    def value(self, node: Any) -> Any:
        """The value of a node: a result, or a float constant."""
        if not isinstance(node, fx.Node):
            return node
        if node.op != "get_attr":
            return self.results[node]
        name = str(node.target)
        if self.program.weights[name].part == "constant":
            kind = name.removeprefix("rope.")
            return self.constant(name, lambda: (self._frequencies(kind), []))
        return self.floats(node, "float32", lambda value: value)

    def _frequencies(self, kind: str) -> Tensor:
        return inverse_frequencies(self.program.config, kind)

    def floats(
        self, node: fx.Node, kind: str, arrange: Callable[[Tensor], Tensor], copy: int = 0
    ) -> Tensor:
        """A constant that stays float, arranged as a `kind` of `stored` has it."""
        sources = self.sources(node)

        def make() -> Made:
            value = arrange(self.weights.floats(sources)).contiguous()
            return value, [stored(kind, value, "values", sources, copy)]

        return self.constant(f"{node.target}.{copy}", make)

    def sources(self, node: fx.Node) -> tuple[str, ...]:
        """The checkpoint's tensors behind a constant."""
        return self.program.weights[str(node.target)].sources

    def constant(self, name: str, make: Callable[[], Made]) -> Tensor:
        """A parameter, made when first asked for."""
        key = name.replace(".", "/")
        if key not in self._parameters:
            value, parts = make()
            self.register_parameter(key, nn.Parameter(value, requires_grad=False))
            self.stored += parts
        found: Tensor = self._parameters[key]  # type: ignore[assignment]
        return found

    def state(self, node: fx.Node) -> Tensor:
        """The buffer of a state."""
        return self.get_buffer(self.states[node])


def state_name(spec: StateSpec) -> str:
    return f"{spec.kind}_{spec.layer}"


def state_shape(spec: StateSpec) -> tuple[int, ...]:
    """Of a filter `[1, taps - 1, H]`, of keys and values `[1, C, K, D]`."""
    batch, channels, *rest = spec.shape
    return (batch, rest[0], channels, *rest[1:])


Handler = Callable[[Stateful, fx.Node], Result]


def _embedding(m: Stateful, node: fx.Node) -> Tensor:
    table, ids = arguments(node)[:2]
    copy = int(m.program.config.tied_embedding)
    return F.embedding(m.value(ids), m.floats(table, "float32", lambda value: value, copy))


def _embedding_nbits(m: Stateful, node: fx.Node) -> Tensor:
    ids, codes, *_ = arguments(node)
    name, sources = str(codes.target).removesuffix(".codes"), m.sources(codes)
    packed = m.weights.packed(sources)
    copy = int(m.program.config.tied_embedding)
    code_kind, scale_kind, find = LOOKUPS[packed.format.bits]

    def table() -> Made:
        value = lookup_codes(packed)
        return value, [stored(code_kind, value, "codes", sources, copy)]

    def scales() -> Made:
        value = lookup_scales(packed)
        return value, [stored(scale_kind, value, "scales", sources, copy)]

    return find(
        m.constant(f"{name}.lookup", table),
        m.constant(f"{name}.lookup_scales", scales),
        m.value(ids),
    )


def _linear(m: Stateful, node: fx.Node) -> Tensor:
    x, weight, bias = (m.value(arg) for arg in arguments(node))
    return F.linear(x, weight, bias)


def _linear_nbits(m: Stateful, node: fx.Node) -> Tensor:
    x, codes, _, _, bias, *_ = arguments(node)
    return F.linear(m.value(x), _matrix(m, codes), m.value(bias))


def _matrix(m: Stateful, codes: fx.Node) -> Tensor:
    """The n-bit weight behind a codes node."""
    name, sources = str(codes.target).removesuffix(".codes"), m.sources(codes)

    def make() -> Made:
        packed = m.weights.packed(sources)
        span, bits = packed.format.span(packed.shape[1]), packed.format.bits
        weight = dynamic_int8_weight(packed.signed_codes(), packed.scales.float(), bits, span)
        return weight, matrix_parts(packed, sources)

    return m.constant(f"{name}.matrix", make)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _rms_norm(m: Stateful, node: fx.Node) -> Tensor:
    x, weight, eps = arguments(node)
    return _norm(m.value(x), m.value(weight), eps)


def _add_rms_norm(m: Stateful, node: fx.Node) -> Sequence[Tensor]:
    x, residual, weight, eps = arguments(node)
    total = m.value(residual) + m.value(x)
    return _norm(total, m.value(weight), eps), total


def _gated_short_conv(m: Stateful, node: fx.Node) -> Sequence[Any]:
    bcx, weight, bias, state = arguments(node)
    gate, out_gate, x = m.value(bcx).chunk(3, dim=-1)
    held = m.state(state)
    seen = torch.cat([held * m.begun, gate * x], dim=1)  # (1, taps - 1 + T, H)
    held.copy_(seen[:, -held.shape[1] :])
    taps = m.floats(weight, "taps", lambda value: value[:, 0].T)  # (taps, H)
    mixed = seen[:, 0 : m.length] * taps[0]
    for index in range(1, len(taps)):
        mixed = mixed + seen[:, index : index + m.length] * taps[index]
    if bias is not None:
        mixed = mixed + m.value(bias)
    return out_gate * mixed, None


def _attention(m: Stateful, node: fx.Node) -> Sequence[Any]:
    q, k, v, q_norm, k_norm, inv_freq, positions, keys, values, eps, window, _ = arguments(node)
    config = m.program.config
    dim = config.head_dim
    angles = m.value(positions).to(torch.float32).unsqueeze(-1) * m.value(inv_freq)
    cos, sin = angles.cos().view(1, -1, 1, dim // 2), angles.sin().view(1, -1, 1, dim // 2)

    def turned(x: Tensor, norm: Tensor, heads: int) -> Tensor:
        first, second = _norm(x.view(1, m.length, heads, dim), norm, eps).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    query = turned(m.value(q), m.value(q_norm), config.num_heads)
    key = turned(m.value(k), m.value(k_norm), config.num_kv_heads)
    value = m.value(v).view(1, m.length, config.num_kv_heads, dim)
    held_keys, held_values = m.state(keys), m.state(values)
    torch.ops.llama.update_cache(key, held_keys, m.start)
    torch.ops.llama.update_cache(value, held_values, m.start)
    mask = _window(m, m.value(positions), window) if window else None
    y = torch.ops.llama.custom_sdpa(
        query, held_keys, held_values, m.start, mask, 0.0, mask is None, dim**-0.5
    )
    return y, None, None


def _window(m: Stateful, positions: Tensor, window: int) -> Tensor:
    """What is added to scores `[T, C]`: nothing where a slot is seen."""
    slots, now = torch.arange(m.context).unsqueeze(0), positions.unsqueeze(1)
    seen = torch.logical_and(slots <= now, slots > now - window)
    return torch.where(seen, 0.0, -torch.inf)


def _swiglu(m: Stateful, node: fx.Node) -> Tensor:
    gate, up = (m.value(x) for x in node.args)
    y: Tensor = F.silu(gate) * up
    return y


def _moe(m: Stateful, node: fx.Node) -> Tensor:
    """Every expert on every token, mixed by shares that are 0 for those not chosen."""
    x, scores, choice, w1, w3, w2, top_k, normalize, scale = arguments(node)
    given, scored = m.value(x), m.value(scores)
    chosen, weights = choose_experts(scored, m.value(choice), top_k, normalize, scale)
    shares = torch.zeros_like(scored).scatter(1, chosen, weights)
    return mix_experts(given, shares, w1, w3, w2, lambda x, weight: F.linear(x, _expert(m, weight)))


def _expert(m: Stateful, weight: fx.Node) -> Tensor:
    """An expert's matrix: n-bit codes that a call would dequantize, or floats."""
    if weight.op == "call_function":
        return _matrix(m, arguments(weight)[0])
    found: Tensor = m.value(weight)
    return found


def lookup_codes(packed: PackedTensor) -> Tensor:
    """Codes as the embedding operators read them: signed int8 `[V, H]`, or two of 4 bits in a byte,
    the first in its higher half."""
    if packed.format.bits == 8:
        return packed.signed_codes()
    return (packed.codes[:, 0::2] << 4) | packed.codes[:, 1::2]


def lookup_scales(packed: PackedTensor) -> Tensor:
    """Scales of a lookup: float32 `[V]` for whole rows, else float16 `[V, G]`.

    Raises `UnsupportedError` where a bfloat16 scale is no float16.
    """
    if packed.format.bits == 8:
        return packed.scales.squeeze(1)
    narrow = packed.scales.to(torch.float16)
    if not torch.equal(narrow.to(torch.bfloat16), packed.scales):
        raise UnsupportedError(
            "a scale of the embedding is too small or too large for the runtime's lookup",
            expected="numbers that float16 has",
            got=f"{float(packed.scales.abs().min()):g} to {float(packed.scales.abs().max()):g}",
            todo="plan 8 bits for the embedding",
        )
    return narrow


def _lookup_byte(table: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    operator = torch.ops.quantized_decomposed.embedding_byte.dtype
    found: Tensor = operator(table, scales, None, -128, 127, ids, dtype=torch.float32)
    return found


def _lookup_nibble(table: Tensor, scales: Tensor, ids: Tensor) -> Tensor:
    operator = torch.ops.quantized_decomposed.embedding_4bit.dtype
    found: Tensor = operator(table, scales, None, -8, 7, ids, dtype=torch.float32)
    return found


# By bits: how codes and scales are stored, and the operator.
LOOKUPS = {
    4: ("swapped", "float16", _lookup_nibble),
    8: ("signed", "row_scales", _lookup_byte),
}


def _flatten(m: Stateful, node: fx.Node) -> Tensor:
    x, start, end = arguments(node)
    found: Tensor = m.value(x).flatten(start, end)
    return found


def _view_as(m: Stateful, node: fx.Node) -> Tensor:
    x, like = (m.value(arg) for arg in node.args)
    found: Tensor = x.view(like.shape)
    return found


def _split(m: Stateful, node: fx.Node) -> Sequence[Tensor]:
    x, sizes, dim = arguments(node)
    parts: Sequence[Tensor] = m.value(x).split(list(sizes), dim)
    return parts


def _getitem(m: Stateful, node: fx.Node) -> Any:
    source, index = node.args
    return m.value(source)[index]


def _unsqueeze(m: Stateful, node: fx.Node) -> Tensor:
    x, dim = node.args
    found: Tensor = m.value(x).unsqueeze(dim)
    return found


def _add(m: Stateful, node: fx.Node) -> Any:
    a, b = (m.value(x) for x in node.args)
    return a + b


def _mul(m: Stateful, node: fx.Node) -> Any:
    a, b = (m.value(x) for x in node.args)
    return a * b


def _sigmoid(m: Stateful, node: fx.Node) -> Tensor:
    return torch.sigmoid(m.value(node.args[0]))


def _nothing(m: Stateful, node: fx.Node) -> None:
    """Read by the operator that uses it (an expert's codes, a symbolic size)."""


HANDLERS: dict[str, Handler] = {
    "aten.add": _add,
    "aten.embedding": _embedding,
    "aten.flatten": _flatten,
    "aten.linear": _linear,
    "aten.mul": _mul,
    "aten.sigmoid": _sigmoid,
    "aten.split_with_sizes": _split,
    "aten.unsqueeze": _unsqueeze,
    "aten.view_as": _view_as,
    "getitem": _getitem,
    "lfm.add_rms_norm": _add_rms_norm,
    "lfm.attention": _attention,
    "lfm.dequantize": _nothing,
    "lfm.embedding_nbits": _embedding_nbits,
    "lfm.gated_short_conv": _gated_short_conv,
    "lfm.linear_nbits": _linear_nbits,
    "lfm.moe": _moe,
    "lfm.rms_norm": _rms_norm,
    "lfm.swiglu": _swiglu,
}
