"""Checks of the Android app without its tools: it parses, and its names match a real bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import tree_sitter_kotlin

from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.chat_template import render
from tests.examples.bundles import app_bundle
from tests.examples.kotlin import GRADLE, KOTLIN, SOURCES, assert_bundle_is_read, fields
from tests.examples.parsing import broken_lines


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("android") / "bundle"
    return app_bundle(output, "executorch", "4", chunk="32")


@pytest.mark.parametrize("path", [*KOTLIN, *GRADLE], ids=lambda path: path.name)
def test_kotlin_parses(path: Path) -> None:
    assert not broken_lines(tree_sitter_kotlin.language(), path.read_bytes())


def test_the_parser_reports_invalid_code() -> None:
    assert broken_lines(tree_sitter_kotlin.language(), b"fun f( { val = }")


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
