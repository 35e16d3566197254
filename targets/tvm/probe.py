"""Every n-bit product of a library on its own, on the inputs that it has inside of the artifact.

The virtual machine shows what goes into and comes out of each kernel. A product gets rounded
activations and must agree with torch on the same ones, so no rounding can turn between the two;
the rounding itself is compared, too. Experts are chosen in turn instead of by scores, so that none
is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lfmc.graph.program import Program, operator_name
from lfmc.parity.compare import FLOAT_TOLERANCE, CaseResult, Rung, difference, operators_rung
from lfmc.passes.pattern import arguments
from lfmc.targets.shared.parameters_file import open_parameters
from lfmc.targets.shared.rounded_program import group_codes
from lfmc.targets.tvm.runtime import TvmStepper

TITLE = "every n-bit product of the artifact, alone, as shipped"
TOKENS = 40
ROUNDING = "round_rows"

Call = tuple[str, Sequence[Tensor]]


def operator_parity(program: Program, folder: Path) -> Rung:
    """The worst of each kind, for one token and for many; `program` is bound to its weights."""
    return operators_rung(TITLE, FLOAT_TOLERANCE, _results(program, folder))


def _results(program: Program, folder: Path) -> Iterator[CaseResult]:
    operators = open_parameters(folder).facts["operators"]
    nodes = {node.name: node for node in program.graph.nodes}
    generator = torch.Generator().manual_seed(0)
    stepper = TvmStepper(folder)
    count = min(TOKENS, stepper.context - 1)
    ids = torch.randint(program.config.vocab_size, (count + 1,), generator=generator)
    for function, own in (("score", ids[:-1]), ("decode", ids[-1:])):
        names = [name for _, name in operators[function]]
        expected = iter(operators[function])
        for name, args in _calls(stepper, own, {*names}):
            if name not in names:
                yield _rounded(args)
                continue
            node, kernel = next(expected)
            if kernel != name:
                raise ValueError(f"the library calls {name} where {kernel} is meant")
            yield from _product(program, nodes[node], name, args)
        if next(expected, None) is not None:
            raise ValueError("the library does not call all products of the program")


def _calls(stepper: TvmStepper, ids: Tensor, names: set[str]) -> list[Call]:
    """Products and roundings of one call, in order, with copies of what they were given and gave,
    but for the constants."""
    found: list[Call] = []

    def keep(function: Any, name: str, before: bool, result: Any, *args: Any) -> int:
        if before and name.startswith("gate_up"):
            _share_out(*_places(args)[:2])
        if not before and (name in names or name.startswith(ROUNDING)):
            found.append((name, [torch.utils.dlpack.from_dlpack(arg).clone() for arg in args]))
        return 0

    stepper.machine.set_instrument(keep)
    try:
        stepper.step(ids)
    finally:
        stepper.machine.set_instrument(lambda *args: 0)
    return found


def _places(args: Sequence[Any]) -> list[Tensor]:
    """`order`, `begins` and `members` of a product with experts."""
    first = 1 if torch.utils.dlpack.from_dlpack(args[0]).dtype == torch.float32 else 3
    return [torch.utils.dlpack.from_dlpack(arg) for arg in args[first : first + 3]]


def _share_out(order: Tensor, begins: Tensor) -> None:
    """Give experts equal shares of all places."""
    count, experts = len(order), len(begins) - 1
    order.copy_(torch.arange(count).flip(0))
    begins.copy_(torch.arange(experts + 1) * count // experts)


def _rounded(args: Sequence[Tensor]) -> CaseResult:
    """Codes are the nearest whole numbers, up to float arithmetic; sums are theirs."""
    x, words, steps, sums = args
    codes = _codes(words)
    exact, step = group_codes(x, x.shape[1] // steps.shape[1])
    own = codes.view(exact.shape)
    apart = float(((own - exact).abs() - 0.5).clamp(min=0).max()) / 127
    far = float((steps - step.squeeze(-1)).abs().max() / step.abs().max().clamp(min=1e-30))
    same = torch.equal(own.sum(-1).int(), sums)
    return CaseResult("rounding of activations", max(apart, far) if same else torch.inf, 1.0)


def _codes(words: Tensor) -> Tensor:
    """Int8 codes, as float32 `[T, K]`, of four in a word."""
    return words.contiguous().view(torch.int8).float()


def _activations(args: Sequence[Tensor]) -> Tensor:
    """What a product multiplies by: rounded, or floats."""
    if args[0].dtype == torch.float32:
        return args[0]
    codes, steps = _codes(args[0]), args[1]
    whole: Tensor = codes.view(*steps.shape, -1) * steps.unsqueeze(-1)
    return whole.flatten(1)


def _product(
    program: Program, node: fx.Node, kernel: str, args: Sequence[Tensor]
) -> Iterator[CaseResult]:
    given, found = _activations(args), args[-1]
    fetch = _fetcher(program)
    if operator_name(node) == "lfm.linear_nbits":
        _, codes, scales, zeros, bias, *numbers = arguments(node)
        weight = torch.ops.lfm.dequantize(fetch(codes), fetch(scales), fetch(zeros), *numbers)
        yield difference(f"linear, {_kind(numbers)}", found, F.linear(given, weight, fetch(bias)))
        return
    _, _, _, w1, w3, w2, top_k, *_ = arguments(node)
    order, begins, members = (held.long() for held in _places(args))
    for expert, (one, three, two) in enumerate(zip(w1, w3, w2, strict=True)):
        places = torch.arange(int(begins[expert]), int(begins[expert + 1]))
        if not len(places) or members[expert] < 0:
            continue
        if kernel.startswith("gate_up"):
            x = given[order[places] // top_k]
            inner = F.silu(x @ _matrix(one, fetch).T) * (x @ _matrix(three, fetch).T)
            yield difference(f"expert's w1 and w3, {_kind_of(one)}", found[places], inner)
        else:
            y = given[places] @ _matrix(two, fetch).T
            yield difference(f"expert's w2, {_kind_of(two)}", found[order[places]], y)


def _fetcher(program: Program) -> Callable[[Any], Any]:
    held = dict(program.module.named_buffers())
    return lambda node: held[str(node.target)] if isinstance(node, fx.Node) else None


def _matrix(node: fx.Node, fetch: Callable[[Any], Any]) -> Tensor:
    if node.op == "get_attr":
        value: Tensor = fetch(node)
        return value
    codes, scales, zeros, *numbers = arguments(node)
    made: Tensor = torch.ops.lfm.dequantize(fetch(codes), fetch(scales), fetch(zeros), *numbers)
    return made


def _kind_of(node: fx.Node) -> str:
    return "floats" if node.op == "get_attr" else _kind(arguments(node)[3:])


def _kind(numbers: Sequence[int]) -> str:
    bits, group, _ = numbers
    return f"{bits} bits, groups of {group}"
