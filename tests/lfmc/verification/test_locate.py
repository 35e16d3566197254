"""When a rung fails: the place that is named, on each rung, and what the command line says."""

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
from lfmc.parity.place import Parting, parting, stored_place
from lfmc.passes.base import Pass
from lfmc.passes.pipeline import pipeline
from lfmc.run.stepper import TorchStepper
from lfmc.targets.base import get_target
from lfmc.verification.locate import diverge as apart
from lfmc.verification.locate.bisect import CannotShow, first_that_differs
from lfmc.verification.locate.cut import ancestors, cut, parts, shown_nodes
from lfmc.verification.locate.search import NOTHING, find_place
from lfmc.verification.rungs import Verification
from tests.factories import random_tokens
from tests.faults.fault import Fault, FaultyTarget
from tests.faults.table import FAULTS
from tests.targets.lowering import Lowered, four_bit, lower


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A right artifact of a tiny model."""
    checkpoint = open_checkpoint(tiny_checkpoint("lfm2", vocab_size=256))
    return lower(checkpoint, four_bit, tmp_path_factory.mktemp("onnx"), context=48)


def failed(number: int, case: str = "one shot") -> Verification:
    result = CaseResult(case, 0.5, 0.0)
    return Verification((Rung(number, "a title", FLOAT_TOLERANCE, (result,)),), None)


def fault(name: str) -> Fault:
    return next(own for own in FAULTS if own.name == name)


def test_a_cut_program_gives_the_value_of_its_node(made: Lowered) -> None:
    program, config = made.program, made.checkpoint.config
    node = shown_nodes(program)[5]
    small = cut(program, node.name)
    small.bind(made.weights.value)
    assert small.config.vocab_size == node.meta["val"].shape[-1]
    assert len(small.weights) < len(program.weights)
    tokens = random_tokens(config, 1, 5)[0]
    seen: dict[str, torch.Tensor] = {}

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    whole = TorchStepper(lambda *inputs: Watching(program.module).run(*inputs), config, 48)
    whole.step(tokens)
    shown = TorchStepper(small.module, config, 48).step(tokens)
    assert torch.equal(shown, seen[node.name].flatten(2)[0])


def test_nodes_lie_in_the_layer_whose_weights_they_read(made: Lowered) -> None:
    where = {node.name: part for node, part in parts(made.program).items()}
    order = [where[node.name] for node in shown_nodes(made.program)]
    assert list(dict.fromkeys(order)) == ["embedding", *(f"layer {n}" for n in range(4)), "head"]


def search(made: Lowered, bad: str, hidden: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """The node that a search finds where all behind `bad` differ, and the nodes it tried."""
    nodes, tried = shown_nodes(made.program), []
    one = Parting(1.0, 0, 0, torch.ones(1, 1), torch.zeros(1, 1))

    def differs(node: torch.fx.Node) -> Parting | None:
        tried.append(node.name)
        if node.name in hidden:
            raise CannotShow("no form")
        return one if any(own.name == bad for own in ancestors(node)) else None

    found = first_that_differs(nodes, nodes[-1], one, differs)
    return found.node.name, tried


def test_the_search_finds_any_node_in_few_steps(made: Lowered) -> None:
    for node in shown_nodes(made.program):
        name, tried = search(made, node.name)
        assert name == node.name
        assert len(tried) <= 10


def test_what_can_not_be_shown_is_passed_over_and_told(made: Lowered) -> None:
    nodes = shown_nodes(made.program)
    name, _ = search(made, nodes[9].name, hidden=(nodes[9].name,))
    after = next(node for node in nodes if node.name == name)
    assert nodes[9] in ancestors(after)
    one = Parting(1.0, 0, 0, torch.ones(1, 1), torch.zeros(1, 1))

    def differs(node: torch.fx.Node) -> Parting | None:
        if node == nodes[9]:
            raise CannotShow("no form")
        return one if nodes[9] in ancestors(node) else None

    assert first_that_differs(nodes, nodes[-1], one, differs).hidden == (nodes[9],)


def test_parting_is_the_first_row_beyond_the_tolerance() -> None:
    reference = torch.ones(3, 8)
    ours = reference.clone()
    ours[1, 5], ours[2, 0] = 1.1, 4.0
    parted = parting(ours, reference, 1e-3)
    assert parted is not None
    assert (parted.difference, parted.row, parted.column) == (3.0, 1, 5)
    corner = parted.corner()
    assert (corner.row, corner.column) == (0, 2)
    assert corner.ours[1][3] == pytest.approx(1.1)
    assert parting(reference, reference, 0.0) is None
    ours[0, 0] = math.nan
    lost = parting(ours, reference, 1e-3)
    assert lost is not None
    assert (lost.row, lost.difference) == (0, math.inf)


def test_a_stored_tensor_of_another_shape_or_dtype_is_told() -> None:
    place = stored_place("a.weight", "values", torch.ones(2).half(), torch.ones(3))
    assert place.note == "float16 [2], the plan has float32 [3]"
    assert json.loads(json.dumps(place.to_dict()))["difference"] == "inf"


def test_rung_1_names_the_module(made: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(apart.TransformersStepper):
        def __init__(self, checkpoint: Any) -> None:
            super().__init__(checkpoint)
            with torch.no_grad():
                self.model.model.layers[2].ffn_norm.weight.mul_(1.01)

    monkeypatch.setattr(apart, "TransformersStepper", Wrong)
    place = find_place(made, failed(1, "prefill, then decode"), Silent())
    assert place is not None
    assert (place.part, place.layer, place.operator) == ("layer 2", 2, "RmsNorm")
    assert place.name == "model.layers.2.ffn_norm"
    assert (place.call, place.token) == (0, 0)


class _LosesEpsilon:
    """A pass that is wrong: norms lose their epsilon."""

    name: ClassVar[str] = "lose-epsilon"
    tolerance: ClassVar[float] = 0.0
    ensures: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> int:
        node = list(program.nodes("lfm.add_rms_norm"))[1]
        node.args = (*node.args[:3], 0.5)
        return 1


def test_rung_2_names_the_pass_and_the_operator(
    made: Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(formats: Any) -> list[Pass]:
        steps = pipeline(formats)
        return [*steps[:3], _LosesEpsilon(), *steps[3:]]

    monkeypatch.setattr(apart, "pipeline", wrong)
    place = find_place(made, failed(2), Silent())
    assert place is not None
    assert (place.part, place.operator) == ("layer 1", "lfm.add_rms_norm")
    assert place.weights == ("model.layers.1.operator_norm.weight",)
    assert "'lose-epsilon'" in str(place.note)


def test_nothing_is_named_where_nothing_differs(made: Lowered) -> None:
    right = Rung(3, "a title", 1.0, (CaseResult("one shot", 0.0, 1.0),))
    assert find_place(made, Verification((right,), None), Silent()) is None
    for number in (1, 2):
        place = find_place(made, failed(number), Silent())
        assert place is not None
        assert (place.part, place.difference) == ("file", 0.5)
    place = find_place(made, failed(3), Silent())
    assert place is not None
    assert place.note == NOTHING


def test_an_error_without_a_place_says_how_to_get_one() -> None:
    with pytest.raises(GateError, match="rung 3 failed") as caught:
        failed(3).require()
    assert caught.value.place is None
    assert "--trace" in str(caught.value.todo)


def exported(model: Path, output: Path, name: str, **options: Any) -> Bundle:
    """A bundle of the ONNX target with a fault."""
    asked = Options(bits="4", context=48, cache=False, **options)
    target = FaultyTarget(get_target("onnx"), fault(name))
    given = open_checkpoint(model), target, output, asked
    return export(*given, force=False, progress=Silent())[0]


def test_verify_traces(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, name = tiny_checkpoint("lfm2"), "w1 and w3 swapped"
    bundle = exported(model, tmp_path / "bundle", name, check="off")
    target = FaultyTarget(get_target("onnx"), fault(name))
    monkeypatch.setattr(reverify, "get_target", lambda name: target)
    arguments = [str(bundle.path), str(model), "--check", "fast", "--trace"]
    done = CliRunner().invoke(command, arguments)
    assert isinstance(done.exception, GateError)
    place = done.exception.place
    assert place is not None
    assert (place.layer, place.operator) == (1, "lfm.swiglu")
    assert done.stdout == place_text(place) + "\n"
    assert "first place that differs: layer 1, lfm.swiglu" in done.stdout
    assert "agrees      up to" in done.stdout
    assert place.where in str(done.exception)


def test_export_traces_and_keeps_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(GateError) as caught:
        exported(tiny_checkpoint("lfm2"), output, "wrong epsilon", check="fast", trace=True)
    place = caught.value.place
    assert place is not None
    assert (place.layer, place.operator) == (2, "lfm.add_rms_norm")
    assert not list(tmp_path.iterdir())
