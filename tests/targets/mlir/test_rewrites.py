"""Rewrites of linalg, each on a short program, and the dispatches that IREE compiles."""

from __future__ import annotations

import re
from collections.abc import Callable

import iree.compiler.tools as compiler
import numpy as np
import pytest
import torch
from torch_mlir import ir

from lfmc.targets.mlir.devices import DEVICES
from lfmc.targets.mlir.gated_conv import fuse_gated_short_convs, hide_gate_results
from lfmc.targets.mlir.iree import FLAGS, add_host_functions
from lfmc.targets.mlir.lower import Lowering
from lfmc.targets.mlir.rewrites import isolate_matmuls, move_sums_innermost, prepare_for_iree
from tests.targets.lowering import Lowered, four_bit

GATED = """
#m = affine_map<(i) -> (i)>
func.func @f(%p: tensor<12xf32>, %s: tensor<1x4xf32>, %t: tensor<2x4xf32>)
    -> (tensor<4xf32>, tensor<1x4xf32>) {
  %e = tensor.empty() : tensor<4xf32>
  %b = tensor.extract_slice %p[0][4][1] : tensor<12xf32> to tensor<4xf32>
  %c = tensor.extract_slice %p[4][4][1] : tensor<12xf32> to tensor<4xf32>
  %x = tensor.extract_slice %p[8][4][1] : tensor<12xf32> to tensor<4xf32>
  %n = linalg.generic {indexing_maps = [#m, #m, #m], iterator_types = ["parallel"]}
      ins(%b, %x : tensor<4xf32>, tensor<4xf32>) outs(%e : tensor<4xf32>) {
  ^bb0(%i: f32, %j: f32, %o: f32):
    %r = arith.mulf %i, %j : f32
    linalg.yield %r : f32 } -> tensor<4xf32>
  %kept = tensor.expand_shape %n [[0, 1]] output_shape [1, 4] : tensor<4xf32> into tensor<1x4xf32>
  %s0 = tensor.extract_slice %s[0, 0][1, 4][1, 1] : tensor<1x4xf32> to tensor<4xf32>
  %t0 = tensor.extract_slice %t[0, 0][1, 4][1, 1] : tensor<2x4xf32> to tensor<4xf32>
  %t1 = tensor.extract_slice %t[1, 0][1, 4][1, 1] : tensor<2x4xf32> to tensor<4xf32>
  %y = linalg.generic {indexing_maps = [#m, #m, #m, #m, #m, #m], iterator_types = ["parallel"]}
      ins(%c, %s0, %t0, %n, %t1 : tensor<4xf32>, tensor<4xf32>, tensor<4xf32>, tensor<4xf32>,
          tensor<4xf32>) outs(%e : tensor<4xf32>) {
  ^bb0(%i: f32, %a: f32, %u: f32, %j: f32, %v: f32, %o: f32):
    %l = arith.mulf %a, %u : f32
    %r = arith.mulf %j, %v : f32
    %w = arith.addf %l, %r : f32
    %q = arith.mulf %i, %w : f32
    linalg.yield %q : f32 } -> tensor<4xf32>
  return %y, %kept : tensor<4xf32>, tensor<1x4xf32>
}
"""

SUM = """
#x = affine_map<(n, g, l) -> (g)>
#w = affine_map<(n, g, l) -> (n, g, l)>
#y = affine_map<(n, g, l) -> (n, l)>
func.func @f(%x: tensor<3xf32>, %w: tensor<2x3x4xf32>, %y: tensor<2x4xf32>) -> tensor<2x4xf32> {
  %r = linalg.generic {indexing_maps = [#x, #w, #y],
      iterator_types = ["parallel", "reduction", "parallel"]}
      ins(%x, %w : tensor<3xf32>, tensor<2x3x4xf32>) outs(%y : tensor<2x4xf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %g = linalg.index 1 : index
    %k = arith.index_cast %g : index to i32
    %z = arith.sitofp %k : i32 to f32
    %p = arith.mulf %a, %b : f32
    %q = arith.mulf %p, %z : f32
    %s = arith.addf %o, %q : f32
    linalg.yield %s : f32 } -> tensor<2x4xf32>
  return %r : tensor<2x4xf32>
}
"""

MATMUL = """
func.func @f(%a: tensor<2x3xf32>, %b: tensor<3x4xf32>, %c: tensor<2x4xf32>) -> tensor<2x4xf32> {
  %r = linalg.matmul ins(%a, %b : tensor<2x3xf32>, tensor<3x4xf32>) outs(%c : tensor<2x4xf32>)
      -> tensor<2x4xf32>
  return %r : tensor<2x4xf32>
}
"""


def parse(text: str) -> ir.Module:
    context = ir.Context()
    context.allow_unregistered_dialects = True
    return ir.Module.parse(text, context)


def run(text: str, *values: np.ndarray) -> list[np.ndarray]:
    """Run a program's function `f` in IREE on this CPU."""
    import iree.runtime as runtime

    code = compiler.compile_str(text, target_backends=[], extra_args=list(DEVICES["cpu"].flags))
    config = runtime.Config("local-task")
    modules = [
        runtime.create_hal_module(config.vm_instance, config.device),
        runtime.VmModule.copy_buffer(config.vm_instance, code),
    ]
    context = runtime.SystemContext(vm_modules=modules, config=config)
    outputs = context.modules[modules[-1].name]["f"](*values)
    return [
        np.array(output.to_host())
        for output in (outputs if isinstance(outputs, tuple) else [outputs])
    ]


def loops(module: ir.Module) -> list[ir.Operation]:
    operations: list[ir.Operation] = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "linalg.generic":
            operations.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return operations


def test_a_gated_convolution_becomes_one_loop_with_equal_results() -> None:
    module = parse(GATED)
    assert fuse_gated_short_convs(module) == 1
    module.operation.verify()
    (loop,) = loops(module)
    assert len(loop.results) == 2
    generator = np.random.default_rng(0)
    shapes = ((12,), (1, 4), (2, 4))
    values = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    p, s, t = values
    newest = p[:4] * p[8:]
    expected = [p[4:8] * (s[0] * t[0] + newest * t[1]), newest[None]]
    for text in (GATED, str(module)):
        for actual, array in zip(run(text, *values), expected, strict=True):
            np.testing.assert_allclose(actual, array, rtol=1e-6)


def test_a_loop_that_reads_the_state_moves_behind_the_merged_loop() -> None:
    """Lowered from StableHLO, a concatenation is a loop whose body reads its inputs by index."""
    read = """
  %copy = linalg.generic {indexing_maps = [affine_map<(i, j) -> (i, j)>],
      iterator_types = ["parallel", "parallel"]} outs(%s : tensor<1x4xf32>) {
  ^bb0(%o: f32):
    %at = linalg.index 1 : index
    %own = tensor.extract %n[%at] : tensor<4xf32>
    linalg.yield %own : f32 } -> tensor<1x4xf32>
  %s0 ="""
    text = GATED.replace("\n  %s0 =", read, 1).replace("return %y, %kept", "return %y, %copy")
    module = parse(text)
    assert fuse_gated_short_convs(module) == 1
    module.operation.verify()
    generator = np.random.default_rng(2)
    shapes = ((12,), (1, 4), (2, 4))
    values = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]
    for actual, array in zip(run(str(module), *values), run(text, *values), strict=True):
        np.testing.assert_allclose(actual, array, rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("%kept = tensor.expand_shape %n", "%kept = tensor.expand_shape %c"),  # no state
        # A slice of another value.
        ("%x = tensor.extract_slice %p[8]", "%x = tensor.extract_slice %pp[8]"),
        ("ins(%c, %s0, %t0, %n, %t1", "ins(%s0, %s0, %t0, %n, %t1"),  # no gate at the end
    ],
)
def test_other_loops_are_not_merged(before: str, after: str) -> None:
    assert before in GATED
    text = GATED.replace(before, after).replace(
        "%p: tensor<12xf32>", "%p: tensor<12xf32>, %pp: tensor<12xf32>"
    )
    module = parse(text)
    original = str(module)
    assert fuse_gated_short_convs(module) == 0
    assert str(module) == original


def test_a_barrier_hides_the_result_of_the_gate_from_fusion() -> None:
    """Before fusion the gate at the end is a separate loop."""
    before, loop, _ = GATED.partition("  %y = linalg.generic")
    module = parse(
        f"""{before}{loop} {{indexing_maps = [#m, #m, #m], iterator_types = ["parallel"]}}
      ins(%c, %n : tensor<4xf32>, tensor<4xf32>) outs(%e : tensor<4xf32>) {{
  ^bb0(%i: f32, %j: f32, %o: f32):
    %r = arith.mulf %i, %j : f32
    linalg.yield %r : f32 }} -> tensor<4xf32>
  return %y, %kept : tensor<4xf32>, tensor<1x4xf32>
}}"""
    )
    assert hide_gate_results(module) == 1
    module.operation.verify()
    assert re.search(r'= "util.optimization_barrier"\(%(\w+)\)', str(module))
    assert hide_gate_results(parse(MATMUL)) == 0


def test_sums_move_innermost_with_equal_results() -> None:
    module = parse(SUM)
    (loop,) = loops(module)
    with module.context:
        move_sums_innermost(loop)
    module.operation.verify()
    kinds = [str(kind) for kind in loop.attributes["iterator_types"]]
    assert ["reduction" in kind for kind in kinds] == [False, False, True]
    assert "linalg.index 2" in str(module)
    generator = np.random.default_rng(1)
    x, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((3,), (2, 3, 4)))
    expected = (x[None, :, None] * w * np.arange(3)[None, :, None]).sum(1)
    for text in (SUM, str(module)):
        (actual,) = run(text, x, w, np.zeros((2, 4), np.float32))
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_barriers_isolate_matmuls() -> None:
    module = parse(MATMUL)
    assert isolate_matmuls(module) == 1
    assert str(module).count("util.optimization_barrier") == 2
    assert isolate_matmuls(parse(SUM)) == 0
    a, b = np.ones((2, 3), np.float32), np.full((3, 4), 2, np.float32)
    (product,) = run(str(module), a, b, np.zeros((2, 4), np.float32))
    assert (product == 6).all()


def test_dispatches_of_a_layer(lowered: Callable[..., Lowered]) -> None:
    """IREE compiles a convolution to one dispatch with two results, and its layer to ten."""
    build = lowered("lfm2-untied", four_bit, "mlir")
    device = DEVICES["cpu"]
    with torch.no_grad():
        lowering = Lowering(build.program, build.weights, 8, "linalg", device)
        module = lowering.module()
    prepare_for_iree(module, device)
    flow = compiler.compile_str(
        add_host_functions(module, lowering.graphs),
        target_backends=[],
        extra_args=[*device.flags, *FLAGS, "--compile-to=flow"],
    ).decode()
    _, _, decode = flow.partition("util.func public @decode(")
    body, _, _ = decode.partition("util.return")
    dispatches = re.findall(r"(:2)? = flow\.dispatch @(\w+)", body)
    config = build.checkpoint.config
    convs = config.layer_types.count("conv")
    assert [results for results, _ in dispatches].count(":2") == convs
    names = [name for _, name in dispatches]
    norm = names[2]  # the sum of squares of the first layer, after two dispatches of the embedding
    norms = [index for index, name in enumerate(names) if name == norm]
    assert config.layer_types[0] == "conv"
    assert norms[2] - norms[0] == 10  # a layer has two norms
