"""The place that a failed rung is traced to, on each rung, and the output of the commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.commands.first_difference import place_text
from lfmc.commands.verify import command
from lfmc.errors import GateError
from lfmc.exporter import reverify
from lfmc.exporter.export import export
from lfmc.graph.program import Program
from lfmc.lowering.request import Options
from lfmc.machine.progress import Silent
from lfmc.parity.compare import FLOAT_TOLERANCE, CaseResult, Rung
from lfmc.parity.place import Mismatch, find_mismatch, stored_tensor_place
from lfmc.passes.base import Pass
from lfmc.passes.pipeline import pipeline
from lfmc.reference.layerwise_program import LayerwiseProgram
from lfmc.run.conversation import Conversation
from lfmc.targets.base import get_target
from lfmc.verification.locate import diverge
from lfmc.verification.locate.bisect import CannotLowerCut, find_first_mismatch
from lfmc.verification.locate.cut import ancestors, cut, observable_nodes, parts_by_node
from lfmc.verification.locate.search import NO_DIFFERENCE, find_place
from lfmc.verification.rungs import Verification
from tests.factories import random_tokens
from tests.faults.fault import Fault, FaultyTarget
from tests.faults.table import FAULTS
from tests.targets.lowering import Lowered, four_bit, lower


@pytest.fixture(scope="module")
def lowered(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Lowered:
    """A correct artifact of a tiny model."""
    checkpoint = open_checkpoint(tiny_checkpoint("lfm2", vocab_size=256))
    return lower(checkpoint, four_bit, tmp_path_factory.mktemp("onnx"), context=48)


def failed(number: int, case: str = "one shot") -> Verification:
    result = CaseResult(case, 0.5, 0.0)
    return Verification((Rung(number, "a title", FLOAT_TOLERANCE, (result,)),), None)


def find_fault(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def test_a_cut_program_returns_the_value_of_its_node(lowered: Lowered) -> None:
    program, config = lowered.program, lowered.checkpoint.config
    node = observable_nodes(program)[5]
    cut_program = cut(program, node.name)
    assert cut_program.config.vocab_size == node.meta["val"].shape[-1]
    assert len(cut_program.weights) < len(program.weights)
    tokens = random_tokens(config, 1, 5)[0]
    values: dict[str, torch.Tensor] = {}

    def record(n: torch.fx.Node, value: Any, conversation: int, call: int) -> None:
        values[n.name] = value

    LayerwiseProgram(program, 48, observe=record).run([Conversation((tokens,))])
    (reply,) = LayerwiseProgram(cut_program, 48).run([Conversation((tokens,))])
    assert torch.equal(reply.logits, values[node.name].flatten(2)[0])


def test_nodes_lie_in_the_layer_whose_weights_they_read(lowered: Lowered) -> None:
    part_by_name = {node.name: part for node, part in parts_by_node(lowered.program).items()}
    order = [part_by_name[node.name] for node in observable_nodes(lowered.program)]
    assert list(dict.fromkeys(order)) == ["embedding", *(f"layer {n}" for n in range(4)), "head"]


def search(lowered: Lowered, wrong: str, hidden: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """Search, with `wrong` and all nodes after it differing; return the result and tried nodes."""
    nodes, tried = observable_nodes(lowered.program), []
    mismatch = Mismatch(1.0, 0, 0, torch.ones(1, 1), torch.zeros(1, 1))

    def compare_node(node: torch.fx.Node) -> Mismatch | None:
        tried.append(node.name)
        if node.name in hidden:
            raise CannotLowerCut("no form")
        return mismatch if any(n.name == wrong for n in ancestors(node)) else None

    result = find_first_mismatch(nodes, nodes[-1], mismatch, compare_node)
    return result.node.name, tried


def test_the_search_finds_any_node_in_few_steps(lowered: Lowered) -> None:
    for node in observable_nodes(lowered.program):
        name, tried = search(lowered, node.name)
        assert name == node.name
        assert len(tried) <= 10


def test_nodes_that_can_not_be_lowered_are_skipped_and_listed(lowered: Lowered) -> None:
    nodes = observable_nodes(lowered.program)
    name, _ = search(lowered, nodes[9].name, hidden=(nodes[9].name,))
    first = next(node for node in nodes if node.name == name)
    assert nodes[9] in ancestors(first)
    mismatch = Mismatch(1.0, 0, 0, torch.ones(1, 1), torch.zeros(1, 1))

    def compare_node(node: torch.fx.Node) -> Mismatch | None:
        if node == nodes[9]:
            raise CannotLowerCut("no form")
        return mismatch if nodes[9] in ancestors(node) else None

    assert find_first_mismatch(nodes, nodes[-1], mismatch, compare_node).hidden == (nodes[9],)


def test_a_mismatch_is_the_first_row_beyond_the_tolerance() -> None:
    reference = torch.ones(3, 8)
    actual = reference.clone()
    actual[1, 5], actual[2, 0] = 1.1, 4.0
    mismatch = find_mismatch(actual, reference, 1e-3)
    assert mismatch is not None
    assert (mismatch.difference, mismatch.row, mismatch.column) == (3.0, 1, 5)
    corner = mismatch.corner()
    assert (corner.row, corner.column) == (0, 2)
    assert corner.ours[1][3] == pytest.approx(1.1)
    assert find_mismatch(reference, reference, 0.0) is None
    actual[0, 0] = math.nan
    mismatch = find_mismatch(actual, reference, 1e-3)
    assert mismatch is not None
    assert (mismatch.row, mismatch.difference) == (0, math.inf)


def test_a_stored_tensor_of_another_shape_or_dtype_has_a_note() -> None:
    place = stored_tensor_place("a.weight", "values", torch.ones(2).half(), torch.ones(3))
    assert place.note == "float16 [2], the plan has float32 [3]"
    assert json.loads(json.dumps(place.to_dict()))["difference"] == "inf"


def test_rung_1_names_the_module(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongReference(diverge.LayerwiseTransformers):
        def _read_stored(self, name: str) -> torch.Tensor:
            return super()._read_stored(name) * (1.01 if name.endswith("2.ffn_norm.weight") else 1)

    monkeypatch.setattr(diverge, "LayerwiseTransformers", WrongReference)
    place = find_place(lowered, failed(1, "prefill, then decode"), Silent())
    assert place is not None
    assert (place.part, place.layer, place.operator) == ("layer 2", 2, "RmsNorm")
    assert place.name == "model.layers.2.ffn_norm"
    assert (place.call, place.token) == (0, 0)


class _WrongEpsilon:
    """A wrong pass, which changes the epsilon of a norm."""

    name: ClassVar[str] = "wrong-epsilon"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        node = list(program.nodes("lfm.add_rms_norm"))[1]
        node.args = (*node.args[:3], 0.5)
        return 1


def test_rung_2_names_the_pass_and_the_operator(
    lowered: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_pipeline(formats: Any) -> list[Pass]:
        steps = pipeline(formats)
        return [*steps[:3], _WrongEpsilon(), *steps[3:]]

    monkeypatch.setattr(diverge, "pipeline", wrong_pipeline)
    place = find_place(lowered, failed(2), Silent())
    assert place is not None
    assert (place.part, place.operator) == ("layer 1", "lfm.add_rms_norm")
    assert place.weights == ("model.layers.1.operator_norm.weight",)
    assert "'wrong-epsilon'" in str(place.note)


def test_no_operator_is_named_if_none_differs(lowered: Lowered) -> None:
    passed = Rung(3, "a title", 1.0, (CaseResult("one shot", 0.0, 1.0),))
    assert find_place(lowered, Verification((passed,), None), Silent()) is None
    for number in (1, 2):
        place = find_place(lowered, failed(number), Silent())
        assert place is not None
        assert (place.part, place.difference) == ("file", 0.5)
    place = find_place(lowered, failed(3), Silent())
    assert place is not None
    assert place.note == NO_DIFFERENCE


def test_an_error_without_a_place_advises_a_trace() -> None:
    with pytest.raises(GateError, match="rung 3 failed") as excinfo:
        failed(3).require()
    assert excinfo.value.place is None
    assert "--trace" in str(excinfo.value.todo)


def exported(model: Path, output: Path, name: str, **options: Any) -> Bundle:
    """Export a bundle of the ONNX target with a fault."""
    export_options = Options(bits="4", context=48, cache=False, **options)
    target = FaultyTarget(get_target("onnx"), find_fault(name))
    arguments = open_checkpoint(model), target, output, export_options
    return export(*arguments, force=False, progress=Silent())[0]


def test_verify_traces(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = tiny_checkpoint("lfm2"), "w1 and w3 swapped"
    bundle = exported(model, tmp_path / "bundle", name, check="off")
    target = FaultyTarget(get_target("onnx"), find_fault(name))
    monkeypatch.setattr(reverify, "get_target", lambda name: target)
    arguments = [str(bundle.path), str(model), "--check", "fast", "--trace"]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, GateError)
    place = result.exception.place
    assert place is not None
    assert (place.layer, place.operator) == (1, "lfm.swiglu")
    assert result.stdout == place_text(place) + "\n"
    assert "first difference: layer 1, lfm.swiglu" in result.stdout
    assert "agrees      up to" in result.stdout
    assert place.where in str(result.exception)


def test_export_traces_and_leaves_no_files(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(GateError) as excinfo:
        exported(tiny_checkpoint("lfm2"), output, "wrong epsilon", check="fast", trace=True)
    place = excinfo.value.place
    assert place is not None
    assert (place.layer, place.operator) == (2, "lfm.add_rms_norm")
    assert not list(tmp_path.iterdir())
