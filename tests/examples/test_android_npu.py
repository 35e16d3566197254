"""The Android app's host for NPUs: names and shapes in Kotlin are a real bundle's, and lfmc's."""

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

HOSTED = [
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


def test_kotlin_reads_what_the_bundle_has(bundle: Bundle) -> None:
    source, manifest = SOURCES["QualcommFacts"], bundle.manifest
    assert_bundle_is_read(bundle)
    told = {"runtime", "stage", "soc", "activations", "lengths", "embedding", "embedding_bits"}
    assert fields(source, "QualcommFacts") == {*told, "interface"} <= set(manifest)
    shape = manifest["interface"]
    assert fields(source, "Interface") == {"hidden_size", "context", "rotary", "states"}
    assert fields(source, "Interface") <= set(shape)
    assert (
        fields(source, "State") == {"kind", "layer", "shape", "window"} <= set(shape["states"][0])
    )


def test_kotlin_opens_the_files_that_lfmc_writes(bundle: Bundle) -> None:
    source, table = SOURCES["QualcommFacts"], SOURCES["Embedding"]
    assert f'"{DECODE}" else "{PREFILL}"' in source
    compiled, edge = (name.format("") for name in (COMPILED["onnxruntime"], SOURCE))
    assert f'if (isCompiled) "{compiled}" else "{edge}"' in source
    assert f'it == "{PARAMETERS}" || it.endsWith("{edge}")' in source
    assert f'bundle.file("{HOST_FILE}")' in table
    assert f'if (facts.isCompiled) "{TABLE_FILE}" else "{PARAMETERS}"' in table
    graphs = {SOURCE.format(graph) for graph in (DECODE, PREFILL)}
    assert graphs | {HOST_FILE, PARAMETERS} == set(bundle.manifest["artifact"])


def test_kotlin_knows_the_options(bundle: Bundle) -> None:
    choices = {option.name: option.choices for option in get_target("qualcomm").options}
    source = SOURCES["QualcommFacts"]
    stages = ", ".join(f'"{stage}"' for stage in choices["stage"])
    assert f"STAGES = listOf({stages})" in source
    (runtime,) = re.findall(r'runtime != "(\w+)"', source)
    assert runtime in choices["runtime"]
    assert bundle.manifest["runtime"] == runtime
    (halves,) = re.findall(r'activations == "(\w+)"', SOURCES["Npu"])
    assert halves in choices["activations"]


def test_kotlin_finds_the_table(bundle: Bundle) -> None:
    held, manifest = open_parameters(bundle.path), bundle.manifest
    name, bits = manifest["embedding"], manifest["embedding_bits"]
    rows = manifest["model"]["vocab_size"]
    assert f"{name}#{bits}:{manifest['interface']['hidden_size']}:{rows}" in held.names
    assert f"{name}#scales" in held.names
    source = SOURCES["Embedding"]
    assert all(text in source for text in ('"$name#$bits:"', '"$name#scales"', f'"{HOST}$name"'))


def test_kotlin_gives_what_the_graphs_take(bundle: Bundle) -> None:
    shape = bundle.manifest["interface"]
    states = {f"{state['kind']}_{state['layer']}" for state in shape["states"]}
    angles = {f"{part}_{kind}" for part in ("cos", "sin") for kind in shape["rotary"]}
    for graph in (DECODE, PREFILL):
        model = onnx.load(bundle.path / SOURCE.format(graph), load_external_data=False).graph
        assert {value.name for value in model.input} == {"hidden", "mask"} | angles | states
        news = {f"{state}_new" for state in states}
        assert {value.name for value in model.output} == {"logits"} | news
    assert all(f'"{part}_$' in SOURCES["Positions"] for part in ("cos", "sin", "mask"))
    assert f"MASKED = {MASKED:.0f}f" in SOURCES["Positions"]
    assert '"${told.kind}_${told.layer}"' in SOURCES["KeptState"]
    names = ('"hidden"', '"logits"', '"${state.name}_new"')
    assert all(name in SOURCES["NpuModel"] for name in names)


def test_sessions_are_asked_for_as_lfmc_asks() -> None:
    asked = re.findall(r'"([\w.]+_[\w.]+)"', SOURCES["Npu"])
    assert session.PROVIDER in SOURCES["Npu"]
    shared = {"session.disable_cpu_ep_fallback", "enable_htp_fp16_precision"}
    assert shared <= set(asked)
    own = Path(session.__file__).read_text(encoding="utf-8")
    assert all(name in own for name in shared)


def test_the_host_needs_no_android() -> None:
    for name in HOSTED:
        imports = re.findall(r"^import (\S+)", SOURCES[name], re.M)
        allowed = ("java.", "kotlin.", "kotlinx.serialization.", "ai.onnxruntime.")
        assert all(own.startswith(allowed) for own in imports), name


def test_pieces_are_cut_as_the_tokenizer_does(bundle: Bundle) -> None:
    """The pattern in Kotlin is what `ByteLevel` cuts by; the bundle's tokenizer is of that kind."""
    (pattern,) = re.findall(r'GPT2 =\s+"""(.+)"""', SOURCES["Pieces"])
    spelled = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text = "It's  1234 'llamas', we'll see\u3000\n\n  日本語 ½!"
    own = Tokenizer.from_file(str(bundle.path / "tokenizer.json")).pre_tokenizer
    assert own is not None
    assert spelled.pre_tokenize_str(text) == own.pre_tokenize_str(text)
