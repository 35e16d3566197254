"""Checks of the Android app without its tools: it parses, and its names match a real bundle."""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import pytest
import tree_sitter_kotlin

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.chat_template import render
from tests.examples.bundles import app_bundle
from tests.examples.kotlin import ANDROID, KOTLIN, SOURCES, assert_bundle_is_read, fields
from tests.examples.parsing import broken_lines

GRADLE = sorted(ANDROID.rglob("*.kts"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("android") / "bundle"
    return app_bundle(output, "executorch", "4", chunk="32")


@pytest.mark.parametrize("path", [*KOTLIN, *GRADLE], ids=lambda path: path.name)
def test_kotlin_parses(path: Path) -> None:
    assert not broken_lines(tree_sitter_kotlin.language(), path.read_bytes())


def test_the_parser_reports_invalid_code() -> None:
    assert broken_lines(tree_sitter_kotlin.language(), b"fun f( { val = }")


def test_the_gradle_files_use_the_entries_of_the_catalogue() -> None:
    catalogue = tomllib.loads((ANDROID / "gradle" / "libs.versions.toml").read_text())
    used = {name for path in GRADLE for name in re.findall(r"libs\.([\w.]+)", path.read_text())}
    libraries = {name.replace("-", ".") for name in catalogue["libraries"]}
    plugins = {"plugins." + name.replace("-", ".") for name in catalogue["plugins"]}
    assert used == libraries | plugins
    entries = [*catalogue["libraries"].values(), *catalogue["plugins"].values()]
    versions = {entry["version"]["ref"] for entry in entries if "version" in entry}
    assert versions == set(catalogue["versions"])
    (module,) = re.findall(r'include\("(.+?)"\)', (ANDROID / "settings.gradle.kts").read_text())
    assert (ANDROID / module.strip(":") / "build.gradle.kts").is_file()


def test_the_library_has_the_version_of_the_exporter() -> None:
    catalogue = tomllib.loads((ANDROID / "gradle" / "libs.versions.toml").read_text())
    assert catalogue["versions"]["executorch"] == version("executorch")


def test_the_manifest_refers_to_existing_names() -> None:
    key = "{http://schemas.android.com/apk/res/android}"
    main = ANDROID / "app" / "src" / "main"
    application = ElementTree.parse(main / "AndroidManifest.xml").getroot().find("application")
    assert application is not None
    (activity,) = application.findall("activity")
    name = activity.attrib[f"{key}name"].removeprefix(".")
    assert f"class {name} : ComponentActivity" in SOURCES[name]
    strings = ElementTree.parse(main / "res" / "values" / "strings.xml").getroot()
    labels = {"@string/" + node.attrib["name"] for node in strings}
    assert application.attrib[f"{key}label"] in labels
    gradle = (ANDROID / "app" / "build.gradle.kts").read_text()
    (namespace,) = re.findall(r'namespace = "(.+)"', gradle)
    assert all(source.startswith(f"package {namespace}\n") for source in SOURCES.values())
    assert "--output examples/android/app/src/main/assets/bundle" in (
        ANDROID / "README.md"
    ).read_text(encoding="utf-8")
    assert "examples/android/app/src/main/assets/bundle/" in (
        ANDROID.parents[1] / ".gitignore"
    ).read_text(encoding="utf-8")


def test_fields_are_found() -> None:
    assert fields(SOURCES["Manifest"], "Golden") == {"text", "prompt", "tokens", "margin"}
    assert fields(SOURCES["Manifest"], "Model") == {"name", "vocab_size"}


def test_kotlin_reads_existing_fields_of_the_bundle(bundle: Bundle) -> None:
    assert fields(SOURCES["Manifest"], "Manifest") == {
        "target",
        "artifact",
        "context",
        "model",
        "tokens",
        "chat_prompt",
        "files",
    }
    assert fields(SOURCES["Manifest"], "ExecuTorchFacts") == {"chunk"} <= set(bundle.manifest)
    assert_bundle_is_read(bundle)


def test_kotlin_calls_the_program_with_its_inputs(bundle: Bundle) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(bundle.path / "model.pte")
    metadata = program.metadata("forward")
    tokens, position = (metadata.input_tensor_meta(index) for index in range(2))
    assert list(tokens.sizes()) == [1, bundle.manifest["chunk"]]
    assert list(position.sizes()) == [1]
    assert tokens.dtype() == position.dtype()
    assert metadata.num_inputs() == 2
    source = SOURCES["ExecuTorchModel"]
    assert "fromBlob(ids, longArrayOf(1, piece.size.toLong()))" in source
    assert "fromBlob(longArrayOf(length.toLong()), longArrayOf(1))" in source
    assert "forward(EValue.from(input), EValue.from(position))" in source


def test_the_chat_prompt_is_the_template(bundle: Bundle) -> None:
    prompt = bundle.manifest["chat_prompt"]
    message = "What is {a} house?"
    expected = render(bundle.path, [{"role": "user", "content": message}])
    assert prompt.replace("{message}", message) == expected
    assert '.replace("{message}", message)' in SOURCES["Chat"]
