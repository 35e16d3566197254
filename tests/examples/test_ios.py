"""What can be said of the iPhone app without Xcode: it parses, and it speaks of what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tree_sitter_swift
from openstep_parser import OpenStepDecoder

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


def test_the_parser_notices_nonsense() -> None:
    assert broken_lines(tree_sitter_swift.language(), b"func f( { let = }")


def test_the_project_names_what_is_there() -> None:
    project = OpenStepDecoder.ParseFromFile((IOS / "LfmDemo.xcodeproj/project.pbxproj").open())
    objects: dict[str, dict[str, Any]] = project["objects"]

    def named(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for inner in value.values():
                yield from named(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from named(inner)
        elif re.fullmatch(r"[0-9A-F]{23,24}", value):
            yield value

    assert project["rootObject"] in objects
    assert set(named(objects)) <= set(objects)
    folders = [o["path"] for o in objects.values() if "SynchronizedRootGroup" in o["isa"]]
    packages = [o["relativePath"] for o in objects.values() if "LocalSwiftPackage" in o["isa"]]
    assert folders == ["LfmDemo"]
    assert packages == ["LfmKit"]
    assert all((IOS / path).is_dir() for path in (*folders, *packages))
    assert (IOS / packages[0] / "Package.swift").is_file()
    copied = {o["path"] for o in objects.values() if o.get("lastKnownFileType") == "folder"}
    assert copied == {"Bundle"}  # what step 1 of the README writes
    assert "--output examples/ios/Bundle" in (IOS / "README.md").read_text()
    assert "examples/ios/Bundle/" in (IOS.parents[1] / ".gitignore").read_text()


def snake(name: str) -> str:
    return re.sub("([A-Z])", lambda match: f"_{match[1].lower()}", name)


def fields(source: str, struct: str) -> set[str]:
    """Stored properties of a Swift struct that are decoded, as JSON has them."""
    body = source.split(f"struct {struct}", 1)[1]
    own = re.split(r"\n    (?:}|public struct)", body, maxsplit=1)[0]
    if struct == "Manifest":
        own = re.sub(r"public struct .*?\n    }", "", body, flags=re.S)
    return {snake(name) for name in re.findall(r"^\s+(?:public )?let (\w+):", own, re.M)}


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


def test_swift_reads_what_the_manifest_has(bundles: dict[str, Bundle]) -> None:
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


def test_swift_calls_what_the_package_has(bundles: dict[str, Bundle]) -> None:
    from lfmc.targets.coreml.package import load_program

    source = KIT["LanguageModel"]
    asked = set(re.findall(r'function: "(\w+)"', source))
    given = set(re.findall(r'inputs\["(\w+)"\]', source))
    for layout, bundle in bundles.items():
        program = load_program(bundle.path)
        assert asked == set(program.functions) == set(bundle.manifest["functions"])
        passed = {s["name"] for s in bundle.manifest["states"] if s["kept_by"] != "MLState"}
        kept = {s["name"] for s in bundle.manifest["states"]} - passed
        assert bool(passed) == (layout == "conv-io")
        for name, tokens in bundle.manifest["functions"].items():
            inputs = program.functions[name].inputs
            unpadded = given - {"valid"} if name == "decode" else given
            assert set(inputs) == unpadded | kept | passed
            assert inputs["input_ids"].shape == (1, tokens)
            assert inputs["position"].shape == (1,)
            for state in bundle.manifest["states"]:
                assert list(inputs[state["name"]].shape) == state["shape"]
            outputs = {var.name for var in program.functions[name].outputs}
            assert outputs == {"logits"} | {f"{state}_out" for state in passed}
    assert 'item.name + "_out"' in source
    assert 'featureValue(for: "logits")' in source
