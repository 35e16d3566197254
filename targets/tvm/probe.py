"""Compare every n-bit product of a library on the inputs that the product has inside the artifact.

The virtual machine reports the inputs and outputs of each kernel. A product takes rounded
activations and must agree with torch on the same rounded activations, so a difference in rounding
can't affect the comparison. The rounding itself is compared as well. Experts take turns instead of
being selected by scores, so that every expert is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lfmc.graph.program import Program, operator_name
from lfmc.parity.compare import FLOAT_TOLERANCE, CaseResult, Rung, compare_logits, operators_rung
from lfmc.passes.pattern import arguments
from lfmc.targets.shared.parameters_file import open_parameters
from lfmc.targets.shared.rounded_operators import group_codes
from lfmc.targets.tvm.runtime import TvmStepper

TITLE = "every n-bit product of the artifact, alone, as shipped"
TOKENS = 40
ROUNDING = "round_rows"

Call = tuple[str, Sequence[Tensor]]


def operator_parity(program: Program, folder: Path) -> Rung:
    """Return the worst difference of each kind, for one token and for many; `program` is bound to
    its weights."""
    return operators_rung(TITLE, FLOAT_TOLERANCE, _results(program, folder))


def _results(program: Program, folder: Path) -> Iterator[CaseResult]:
    operators = open_parameters(folder).facts["operators"]
    nodes = {node.name: node for node in program.graph.nodes}
    generator = torch.Generator().manual_seed(0)
    stepper = TvmStepper(folder)
    count = min(TOKENS, stepper.context - 1)
    ids = torch.randint(program.config.vocab_size, (count + 1,), generator=generator)
    for function, tokens in (("score", ids[:-1]), ("decode", ids[-1:])):
        names = [name for _, name in operators[function]]
        expected = iter(operators[function])
        for name, args in _record_calls(stepper, tokens, {*names}):
            if name not in names:
                yield _compare_rounding(args)
                continue
            node, kernel = next(expected)
            if kernel != name:
                raise ValueError(f"the library calls {name}, expected {kernel}")
            yield from _compare_product(program, nodes[node], name, args)
        if next(expected, None) is not None:
            raise ValueError("the library does not call all products of the program")


def _record_calls(stepper: TvmStepper, ids: Tensor, names: set[str]) -> list[Call]:
    """Run the stepper; return its products and roundings in order, with copies of their inputs and
    outputs except constants."""
    calls: list[Call] = []

    def record(function: Any, name: str, before: bool, result: Any, *args: Any) -> int:
        if before and name.startswith("gate_up"):
            _distribute_places(*_expert_inputs(args)[:2])
        if not before and (name in names or name.startswith(ROUNDING)):
            calls.append((name, [torch.utils.dlpack.from_dlpack(arg).clone() for arg in args]))
        return 0

    stepper.machine.set_instrument(record)
    try:
        stepper.step(ids)
    finally:
        stepper.machine.set_instrument(lambda *args: 0)
    return calls


def _expert_inputs(args: Sequence[Any]) -> list[Tensor]:
    """Return `order`, `begins` and `members` of a product with experts."""
    first = 1 if torch.utils.dlpack.from_dlpack(args[0]).dtype == torch.float32 else 3
    return [torch.utils.dlpack.from_dlpack(arg) for arg in args[first : first + 3]]


def _distribute_places(order: Tensor, begins: Tensor) -> None:
    """Assign an equal share of all places to each expert."""
    count, experts = len(order), len(begins) - 1
    order.copy_(torch.arange(count).flip(0))
    begins.copy_(torch.arange(experts + 1) * count // experts)


def _compare_rounding(args: Sequence[Tensor]) -> CaseResult:
    """Check that codes are the nearest integers, up to float arithmetic, and that sums are the sums
    of the codes."""
    x, words, steps, sums = args
    codes = _unpack_codes(words)
    scaled, step = group_codes(x, x.shape[1] // steps.shape[1])
    rounded = codes.view(scaled.shape)
    code_error = float(((rounded - scaled).abs() - 0.5).clamp(min=0).max()) / 127
    step_error = float((steps - step.squeeze(-1)).abs().max() / step.abs().max().clamp(min=1e-30))
    sums_match = torch.equal(rounded.sum(-1).int(), sums)
    return CaseResult(
        "rounding of activations", max(code_error, step_error) if sums_match else torch.inf, 1.0
    )


def _unpack_codes(words: Tensor) -> Tensor:
    """Unpack int8 codes, four in a word, to float32 `[T, K]`."""
    return words.contiguous().view(torch.int8).float()


def _activations(args: Sequence[Tensor]) -> Tensor:
    """Return the activations of a product, dequantized if they are rounded."""
    if args[0].dtype == torch.float32:
        return args[0]
    codes, steps = _unpack_codes(args[0]), args[1]
    values: Tensor = codes.view(*steps.shape, -1) * steps.unsqueeze(-1)
    return values.flatten(1)


def _compare_product(
    program: Program, node: fx.Node, kernel: str, args: Sequence[Tensor]
) -> Iterator[CaseResult]:
    activations, output = _activations(args), args[-1]
    load = _weight_loader(program)
    if operator_name(node) == "lfm.linear_nbits":
        _, codes, scales, zeros, bias, *numbers = arguments(node)
        weight = torch.ops.lfm.dequantize(load(codes), load(scales), load(zeros), *numbers)
        yield compare_logits(
            f"linear, {_describe_format(numbers)}",
            output,
            F.linear(activations, weight, load(bias)),
        )
        return
    _, _, _, w1, w3, w2, top_k, *_ = arguments(node)
    order, begins, members = (tensor.long() for tensor in _expert_inputs(args))
    for expert, (w1_node, w3_node, w2_node) in enumerate(zip(w1, w3, w2, strict=True)):
        places = torch.arange(int(begins[expert]), int(begins[expert + 1]))
        if not len(places) or members[expert] < 0:
            continue
        if kernel.startswith("gate_up"):
            x = activations[order[places] // top_k]
            expected = F.silu(x @ _dequantize(w1_node, load).T) * (x @ _dequantize(w3_node, load).T)
            yield compare_logits(
                f"expert's w1 and w3, {_format_name(w1_node)}", output[places], expected
            )
        else:
            expected = activations[places] @ _dequantize(w2_node, load).T
            yield compare_logits(
                f"expert's w2, {_format_name(w2_node)}", output[order[places]], expected
            )


def _weight_loader(program: Program) -> Callable[[Any], Any]:
    return lambda node: program.constant(str(node.target)) if isinstance(node, fx.Node) else None


def _dequantize(node: fx.Node, load: Callable[[Any], Any]) -> Tensor:
    if node.op == "get_attr":
        value: Tensor = load(node)
        return value
    codes, scales, zeros, *numbers = arguments(node)
    matrix: Tensor = torch.ops.lfm.dequantize(load(codes), load(scales), load(zeros), *numbers)
    return matrix


def _format_name(node: fx.Node) -> str:
    return "floats" if node.op == "get_attr" else _describe_format(arguments(node)[3:])


def _describe_format(numbers: Sequence[int]) -> str:
    bits, group, _ = numbers
    return f"{bits} bits, groups of {group}"
