"""quantize-linears: every weight gets exactly the format of the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lfmc.calib_free.grid.formats import Floats, Format
from lfmc.errors import InputError
from lfmc.graph.program import Program, Weight
from lfmc.passes.base import apply
from lfmc.passes.merge_projections import MergeProjections
from lfmc.passes.quantize_linears import QuantizeLinears
from tests.passes.graphs import QuantizedWeights, program_of, random

FLOAT = Floats("float32")
FOUR = Format(4, 32, False, "float16")
THREE = Format(3, 16, True, "float16")
X = random(2, 40)


class Two(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 16, bias=bias), nn.Linear(16, 5, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.second(torch.relu(self.first(x))),)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Module() for _ in range(2))
        for expert in self.experts:
            expert.w1, expert.w3 = nn.Linear(40, 16, bias=False), nn.Linear(40, 16, bias=False)
            expert.w2 = nn.Linear(16, 40, bias=False)

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        lists = ([getattr(e, n).weight for e in self.experts] for n in ("w1", "w3", "w2"))
        return (torch.ops.lfm.moe(x, scores, scores, *lists, 1, True, 1.0),)


def quantized(
    module: nn.Module, formats: dict[str, Format | Floats], *inputs: Tensor
) -> tuple[Program, int]:
    """Return the program after the pass and its number of rewrites.

    Assert that its results equal those of the module with dequantized weights.
    """
    program = program_of(module, *inputs, clean=True)
    weights = QuantizedWeights({k: v.clone() for k, v in module.state_dict().items()}, formats)
    (record,) = apply([QuantizeLinears(formats)], program)
    results = program.bind(weights.value)(*inputs)
    module.load_state_dict({name: weights.dequantized(name) for name in module.state_dict()})
    for actual, expected in zip(results, module(*inputs), strict=True):
        assert torch.equal(actual, expected)
    return program, record.changed


def test_each_matrix_gets_its_format(golden: Callable[[str, str], None]) -> None:
    program, fired = quantized(Two(), {"first.weight": FOUR, "second.weight": THREE}, X)
    assert fired == 2
    first, second = program.nodes("lfm.linear_nbits")
    assert first.args[5:] == (4, 32, 40)
    assert second.args[5:] == (3, 16, 16)
    assert second.args[3] is None  # symmetric: no zero points
    assert program.weights["first.zeros"] == Weight(("first.weight",), "zeros")
    golden("quantize_linears", program.text())


def test_a_bias_stays_float() -> None:
    names = ("first.weight", "first.bias", "second.weight", "second.bias")
    formats = dict.fromkeys(names, FOUR) | dict.fromkeys(names[1::2], FLOAT)
    program, fired = quantized(Two(bias=True), formats, X)
    assert fired == 2
    assert program.weights["second.bias"] == Weight(("second.bias",))


def test_must_not_fire_on_what_the_plan_keeps_float() -> None:
    program, fired = quantized(Two(), {"first.weight": FOUR, "second.weight": FLOAT}, X)
    assert fired == 1
    assert [n.args[1].target for n in program.nodes("aten.linear")] == ["second.weight"]


def test_must_not_fire_on_a_weight_that_is_computed() -> None:
    class Computed(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (nn.functional.linear(x, self.first.weight * 2),)

    program = program_of(Computed(), X, clean=True)
    text = program.text()
    (record,) = apply([QuantizeLinears({"first.weight": FOUR, "second.weight": FOUR})], program)
    assert (record.changed, program.text()) == (0, text)


def test_experts_of_one_layer_can_have_different_formats() -> None:
    module = Experts()
    formats = dict(zip(module.state_dict(), [FOUR, THREE, FLOAT, THREE, FLOAT, FOUR], strict=True))
    scores = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    program, fired = quantized(module, formats, X, scores)
    assert fired == 4
    widths = [node.args[3:5] for node in program.nodes("lfm.dequantize")]
    assert sorted(widths) == [(3, 16), (3, 16), (4, 32), (4, 32)]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.w1, self.mlp.w3 = nn.Linear(40, 16, bias=False), nn.Linear(40, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.lfm.swiglu(self.mlp.w1(x), self.mlp.w3(x)),)


def merged(formats: dict[str, Format | Floats]) -> tuple[Program, QuantizedWeights, nn.Module]:
    module = Gated()
    program = program_of(module, X, clean=True)
    weights = QuantizedWeights({k: v.clone() for k, v in module.state_dict().items()}, formats)
    apply([MergeProjections(), QuantizeLinears(formats)], program)
    return program, weights, module


def test_a_merged_matrix_stacks_its_sources() -> None:
    program, weights, module = merged(dict.fromkeys(("mlp.w1.weight", "mlp.w3.weight"), FOUR))
    sources = ("mlp.w1.weight", "mlp.w3.weight")
    assert program.weights["mlp.w1+w3.codes"] == Weight(sources, "codes")
    program.weights = {n: w for n, w in program.weights.items() if n.startswith("mlp.w1+w3.")}
    del program.weights["mlp.w1+w3.weight"]
    result = program.bind(weights.value)(X)[0]
    module.load_state_dict({name: weights.dequantized(name) for name in sources})
    torch.testing.assert_close(result, module(X)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("w3_format", [THREE, FLOAT])
def test_merged_matrices_with_different_formats_are_an_input_error(
    w3_format: Format | Floats,
) -> None:
    with pytest.raises(InputError) as caught:
        merged({"mlp.w1.weight": FOUR, "mlp.w3.weight": w3_format})
    message = str(caught.value)
    assert "mlp.w1.weight, mlp.w3.weight" in message
    assert f"{FOUR.name}, {w3_format.name}" in message
    assert caught.value.exit_code == 2


def test_nothing_is_quantized_twice() -> None:
    program = program_of(Two(), X, clean=True)
    formats = dict.fromkeys(("first.weight", "second.weight"), FOUR)
    apply([QuantizeLinears(formats)], program)
    text = program.text()
    assert apply([QuantizeLinears(formats)], program)[0].changed == 0
    assert program.text() == text
