"""Checks of the iPhone app without Xcode: it parses, and its names match a real bundle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tree_sitter_swift

from lfmc.bundle.bundle import Bundle
from tests.examples.bundles import app_bundle
from tests.examples.parsing import broken_lines

IOS = Path(__file__).parents[2] / "examples" / "ios"
SOURCES = sorted(IOS.rglob("*.swift"))
KIT = {path.stem: path.read_text(encoding="utf-8") for path in SOURCES if "LfmKit" in path.parts}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("ios")
    return {
        layout: app_bundle(folder / layout, "coreml", "4", layout=layout)
        for layout in ("mlstate", "conv-io")
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_swift_parses(path: Path) -> None:
    assert not broken_lines(tree_sitter_swift.language(), path.read_bytes())


def test_the_parser_reports_invalid_code() -> None:
    assert broken_lines(tree_sitter_swift.language(), b"func f( { let = }")


def snake(name: str) -> str:
    return re.sub("([A-Z])", lambda match: f"_{match[1].lower()}", name)


def fields(source: str, struct: str) -> set[str]:
    """Return the JSON names of the decoded stored properties of a Swift struct."""
    body = source.split(f"struct {struct}", 1)[1]
    properties = re.split(r"\n    (?:}|public struct)", body, maxsplit=1)[0]
    if struct == "Manifest":
        properties = re.sub(r"public struct .*?\n    }", "", body, flags=re.S)
    return {snake(name) for name in re.findall(r"^\s+(?:public )?let (\w+):", properties, re.M)}


def test_fields_are_found() -> None:
    assert fields(KIT["Manifest"], "Manifest") == {
        "target",
        "context",
        "package",
        "functions",
        "compute_units",
        "tokens",
        "states",
    }
    assert fields(KIT["Manifest"], "State") == {"name", "shape", "kept_by"}


def test_swift_reads_existing_fields_of_the_manifest(bundles: dict[str, Bundle]) -> None:
    source = KIT["Manifest"]
    for bundle in bundles.values():
        manifest = bundle.manifest
        assert fields(source, "Manifest") <= set(manifest)
        assert fields(source, "Tokens") <= set(manifest["tokens"])
        assert fields(source, "State") <= set(manifest["states"][0])
        assert f'case "{manifest["compute_units"]}":' in source
        assert {state["dtype"] for state in manifest["states"]} == {"float16"}
    golden = next(iter(bundles.values())).read_json("golden.json")[0]
    assert fields(KIT["SelfTest"], "Golden") <= set(golden)


def test_swift_uses_existing_functions_and_inputs_of_the_package(
    bundles: dict[str, Bundle],
) -> None:
    from lfmc.targets.coreml.package import load_program

    source = KIT["LanguageModel"]
    functions = set(re.findall(r'function: "(\w+)"', source))
    input_names = set(re.findall(r'inputs\["(\w+)"\]', source))
    for layout, bundle in bundles.items():
        program = load_program(bundle.path)
        assert functions == set(program.functions) == set(bundle.manifest["functions"])
        io_states = {s["name"] for s in bundle.manifest["states"] if s["kept_by"] != "MLState"}
        mlstates = {s["name"] for s in bundle.manifest["states"]} - io_states
        assert bool(io_states) == (layout == "conv-io")
        for name, tokens in bundle.manifest["functions"].items():
            inputs = program.functions[name].inputs
            expected = input_names - {"valid"} if name == "decode" else input_names
            assert set(inputs) == expected | mlstates | io_states
            assert inputs["input_ids"].shape == (1, tokens)
            assert inputs["position"].shape == (1,)
            for state in bundle.manifest["states"]:
                assert list(inputs[state["name"]].shape) == state["shape"]
            outputs = {var.name for var in program.functions[name].outputs}
            assert outputs == {"logits"} | {f"{state}_out" for state in io_states}
    assert 'item.name + "_out"' in source
    assert 'featureValue(for: "logits")' in source
