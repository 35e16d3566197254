"""The sources of the Android app, and the bundle fields that they read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lfmc.bundle.bundle import Bundle

ANDROID = Path(__file__).parents[2] / "examples" / "android"
KOTLIN = sorted(ANDROID.rglob("*.kt"))
GRADLE = sorted(ANDROID.rglob("*.kts"))
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in KOTLIN}


def fields(source: str, class_name: str) -> set[str]:
    """Return the JSON names of a serializable class's properties."""
    body = source.split(f"class {class_name}(", 1)[1].split("\n)", 1)[0].split(")\n", 1)[0]
    properties = re.findall(r'(?:@SerialName\("(\w+)"\) )?val (\w+):', body)
    return {serial_name or name for serial_name, name in properties}


def assert_bundle_is_read(bundle: Bundle) -> None:
    """Assert that the bundle has every field that the app reads, and a target that it opens."""
    source, manifest = SOURCES["Manifest"], bundle.manifest
    assert f'"{manifest["target"]}" ->' in SOURCES["OpenModel"]
    assert fields(source, "Manifest") <= set(manifest)
    assert fields(source, "Model") <= set(manifest["model"])
    assert fields(source, "Tokens") <= set(manifest["tokens"])
    assert all(fields(source, "Stored") <= set(stored) for stored in manifest["files"].values())
    golden = json.loads((bundle.path / "golden.json").read_text())
    assert all(fields(source, "Golden") <= set(prompt) for prompt in golden)
    file_names = {name for text in SOURCES.values() for name in re.findall(r'"(\w+\.json)"', text)}
    assert file_names == {"manifest.json", "tokenizer.json", "golden.json"}
    assert file_names | set(manifest["artifact"]) <= {*manifest["files"], "manifest.json"}
