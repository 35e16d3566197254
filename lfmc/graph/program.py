"""A traced decoder: a graph of operators, and the source of each constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from lfmc.model import DecoderConfig, StateSpec

Part = Literal["values", "codes", "scales", "zeros", "constant"]


@dataclass(frozen=True)
class Weight:
    """The description of a constant of the graph, without its value.

    `sources` are tensors of the checkpoint, stacked along dim 0; there are several if projections
    were merged. `part` is one part of these tensors: the float `values`, or the `codes`, `scales`
    or `zeros` of their quantized form. A `constant` (rotary frequencies) is computed from the
    configuration and has no sources.
    """

    sources: tuple[str, ...]
    part: Part = "values"


ReadValue = Callable[[str, Weight], Tensor]


@dataclass
class Program:
    """An `fx` graph whose constants are `get_attr` nodes; inputs are tokens, positions and states.

    Outputs are the logits `[B, T, V]`, then the new states in the order of `states`. The constants
    of `module` are fake tensors, which have a shape and a dtype only; `bind` sets the function that
    returns their real values.
    """

    module: fx.GraphModule
    config: DecoderConfig
    states: tuple[StateSpec, ...]
    weights: dict[str, Weight] = field(default_factory=dict)
    _value: ReadValue | None = field(default=None, repr=False)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def nodes(self, name: str) -> Iterator[fx.Node]:
        """Yield the calls of an operator, by its short name (`lfm.moe`, `aten.linear`)."""
        for node in self.graph.nodes:
            if node.op == "call_function" and operator_name(node) == name:
                yield node

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes of tokens and positions, then of the states in their order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def tensor_behind(self, weight: fx.Node) -> str:
        """Return the name of the checkpoint tensor of a constant or a dequantize call."""
        constant: Any = weight.args[0] if weight.op == "call_function" else weight
        return self.weights[str(constant.target)].sources[0]

    def count(self, name: str) -> int:
        return sum(1 for _ in self.nodes(name))

    def add_weight(self, name: str, weight: Weight, value: Tensor) -> fx.Node:
        """Add a constant; return its `get_attr` node, which becomes the first of the graph."""
        set_attribute(self.module, name, value)
        self.weights[name] = weight
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        node.meta["val"] = value
        return node

    def call(self, op: Any, *args: Any) -> fx.Node:
        """Insert a call of `op` at the graph's insertion point and compute its fake result."""
        node = self.graph.call_function(op, args)
        node.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Replace all uses of `old` by `new`; erase `old` and its inputs without other users."""
        old.replace_all_uses_with(new)
        candidates = [old]
        while candidates:
            node = candidates.pop()
            if node.users or node._erased or node.op in ("placeholder", "output"):
                continue
            candidates.extend(node.all_input_nodes)
            self.graph.erase_node(node)

    def bind(self, value: ReadValue) -> Callable[..., tuple[Any, ...]]:
        """Set the function that returns the real value of a constant each time it is read.

        Returns `run`, which runs the bound program in torch.
        """
        self._value = value
        return self.run

    def constant(self, name: str) -> Tensor:
        """Return the real value of a constant. Raises `ValueError` if the program is not bound."""
        if self._value is None:
            raise ValueError("the program is not bound to weights")
        return self._value(name, self.weights[name])

    def run(self, *inputs: Tensor) -> tuple[Any, ...]:
        """Run the bound program in torch; every constant is read when a node uses it."""
        return tuple(_Interpreter(self).run(*inputs))

    def text(self) -> str:
        """Return the graph as text, one operator per line, for people and for golden tests."""
        lines = []
        for node in self.graph.nodes:
            if node.op == "placeholder":
                lines.append(f"%{node.name} = input {_shape(node)}")
            elif node.op == "get_attr":
                lines.append(f"%{node.name} = weight {node.target} {_shape(node)}")
            elif node.op == "output":
                lines.append(f"return {_argument(node.args[0])}")
            else:
                values = [*map(_argument, node.args)]
                values += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
                lines.append(f"%{node.name} = {operator_name(node)}({', '.join(values)})")
        return "\n".join(lines)


class _Interpreter(fx.Interpreter):
    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._program = program

    def fetch_attr(self, target: str) -> Any:
        if target in self._program.weights:
            return self._program.constant(target)
        return super().fetch_attr(target)  # a submodule


def operator_name(node: fx.Node) -> str:
    """Return the short name: `aten.linear` for `torch.ops.aten.linear.default`, or `getitem`."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return getattr(target, "__name__", str(target))


def set_attribute(module: nn.Module, name: str, value: Tensor) -> None:
    """Set `module.a.b.c`, creating missing modules `a` and `a.b`."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if leaf in module._buffers or not hasattr(module, leaf):
        module.register_buffer(leaf, value)
    else:
        setattr(module, leaf, value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return "" if value is None else f"{value.dtype}{list(value.shape)}".replace("torch.", "")


def _argument(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return repr(value)
