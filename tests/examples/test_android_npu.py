"""The Android app's host for NPUs: its names and shapes match a real bundle and lfmc."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from lfmc.bundle.bundle import Bundle
from lfmc.targets.base import get_target
from lfmc.targets.npu.bundle import DECODE, HOST_FILE, PREFILL, TABLE_FILE
from lfmc.targets.npu.constants import HOST
from lfmc.targets.npu.interface import MASKED
from lfmc.targets.qualcomm import session
from lfmc.targets.qualcomm.runtime import COMPILED, SOURCE
from lfmc.targets.shared.parameters_file import PARAMETERS, open_parameters
from tests.examples.bundles import app_bundle
from tests.examples.kotlin import SOURCES, assert_bundle_is_read, fields

HOST_SOURCES = [
    "Bundle",
    "Embedding",
    "Graph",
    "KeptState",
    "LanguageModel",
    "Manifest",
    "NpuModel",
    "Pieces",
    "Positions",
    "QualcommFacts",
    "Safetensors",
    "SelfTest",
    "Tokenizer",
    "Writer",
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("android") / "bundle"
    return app_bundle(output, "qualcomm", "8", stage="edge", chunk="16")


def test_kotlin_reads_existing_fields_of_the_bundle(bundle: Bundle) -> None:
    source, manifest = SOURCES["QualcommFacts"], bundle.manifest
    assert_bundle_is_read(bundle)
    names = {"runtime", "stage", "soc", "activations", "lengths", "embedding", "embedding_bits"}
    assert fields(source, "QualcommFacts") == {*names, "interface"} <= set(manifest)
    interface = manifest["interface"]
    assert fields(source, "Interface") == {"hidden_size", "context", "rotary", "states"}
    assert fields(source, "Interface") <= set(interface)
    state_fields = {"kind", "layer", "shape", "window"}
    assert fields(source, "State") == state_fields <= set(interface["states"][0])


def test_kotlin_opens_files_that_lfmc_writes(bundle: Bundle) -> None:
    source, table = SOURCES["QualcommFacts"], SOURCES["Embedding"]
    assert f'"{DECODE}" else "{PREFILL}"' in source
    compiled, edge = (name.format("") for name in (COMPILED["onnxruntime"], SOURCE))
    assert f'if (isCompiled) "{compiled}" else "{edge}"' in source
    assert f'it == "{PARAMETERS}" || it.endsWith("{edge}")' in source
    assert f'bundle.file("{HOST_FILE}")' in table
    assert f'if (facts.isCompiled) "{TABLE_FILE}" else "{PARAMETERS}"' in table
    graphs = {SOURCE.format(graph) for graph in (DECODE, PREFILL)}
    assert graphs | {HOST_FILE, PARAMETERS} == set(bundle.manifest["artifact"])


def test_kotlin_supports_the_option_values(bundle: Bundle) -> None:
    choices = {option.name: option.choices for option in get_target("qualcomm").options}
    source = SOURCES["QualcommFacts"]
    stages = ", ".join(f'"{stage}"' for stage in choices["stage"])
    assert f"STAGES = listOf({stages})" in source
    (runtime,) = re.findall(r'runtime != "(\w+)"', source)
    assert runtime in choices["runtime"]
    assert bundle.manifest["runtime"] == runtime
    (float16,) = re.findall(r'activations == "(\w+)"', SOURCES["Npu"])
    assert float16 in choices["activations"]


def test_kotlin_finds_the_table(bundle: Bundle) -> None:
    parameters, manifest = open_parameters(bundle.path), bundle.manifest
    name, bits = manifest["embedding"], manifest["embedding_bits"]
    rows = manifest["model"]["vocab_size"]
    assert f"{name}#{bits}:{manifest['interface']['hidden_size']}:{rows}" in parameters.names
    assert f"{name}#scales" in parameters.names
    source = SOURCES["Embedding"]
    assert all(text in source for text in ('"$name#$bits:"', '"$name#scales"', f'"{HOST}$name"'))


def test_kotlin_passes_the_inputs_of_the_graphs(bundle: Bundle) -> None:
    interface = bundle.manifest["interface"]
    states = {f"{state['kind']}_{state['layer']}" for state in interface["states"]}
    angles = {f"{part}_{kind}" for part in ("cos", "sin") for kind in interface["rotary"]}
    for graph in (DECODE, PREFILL):
        model = onnx.load(bundle.path / SOURCE.format(graph), load_external_data=False).graph
        assert {value.name for value in model.input} == {"hidden", "mask"} | angles | states
        new_states = {f"{state}_new" for state in states}
        assert {value.name for value in model.output} == {"logits"} | new_states
    assert all(f'"{part}_$' in SOURCES["Positions"] for part in ("cos", "sin", "mask"))
    assert f"MASKED = {MASKED:.0f}f" in SOURCES["Positions"]
    assert '"${told.kind}_${told.layer}"' in SOURCES["KeptState"]
    names = ('"hidden"', '"logits"', '"${state.name}_new"')
    assert all(name in SOURCES["NpuModel"] for name in names)


def test_kotlin_uses_the_session_options_of_lfmc() -> None:
    options = re.findall(r'"([\w.]+_[\w.]+)"', SOURCES["Npu"])
    assert session.PROVIDER in SOURCES["Npu"]
    shared = {"session.disable_cpu_ep_fallback", "enable_htp_fp16_precision"}
    assert shared <= set(options)
    python_source = Path(session.__file__).read_text(encoding="utf-8")
    assert all(name in python_source for name in shared)


def test_the_host_needs_no_android() -> None:
    for name in HOST_SOURCES:
        imports = re.findall(r"^import (\S+)", SOURCES[name], re.M)
        allowed = ("java.", "kotlin.", "kotlinx.serialization.", "ai.onnxruntime.")
        assert all(package.startswith(allowed) for package in imports), name


def test_kotlin_splits_text_as_the_tokenizer_does(bundle: Bundle) -> None:
    """The pattern in Kotlin splits text as `ByteLevel` does, which the bundle's tokenizer uses."""
    (pattern,) = re.findall(r'GPT2 =\s+"""(.+)"""', SOURCES["Pieces"])
    kotlin = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = "It's  1234 'llamas', we'll see\u3000\n\n  日本語 ½!"
    expected = Tokenizer.from_file(str(bundle.path / "tokenizer.json")).pre_tokenizer
    assert expected is not None
    assert kotlin.pre_tokenize_str(text) == expected.pre_tokenize_str(text)
