"""The Android app's sources, and what of every bundle they read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lfmc.bundle.bundle import Bundle

ANDROID = Path(__file__).parents[2] / "examples" / "android"
KOTLIN = sorted(ANDROID.rglob("*.kt"))
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in KOTLIN}


def fields(source: str, name: str) -> set[str]:
    """Names in JSON of a serializable class's properties."""
    body = source.split(f"class {name}(", 1)[1].split("\n)", 1)[0].split(")\n", 1)[0]
    found = re.findall(r'(?:@SerialName\("(\w+)"\) )?val (\w+):', body)
    return {serial or plain for serial, plain in found}


def assert_bundle_is_read(bundle: Bundle) -> None:
    """The bundle has what the app reads of every bundle, and its target is one that it opens."""
    source, manifest = SOURCES["Manifest"], bundle.manifest
    assert f'"{manifest["target"]}" ->' in SOURCES["OpenModel"]
    assert fields(source, "Manifest") <= set(manifest)
    assert fields(source, "Model") <= set(manifest["model"])
    assert fields(source, "Tokens") <= set(manifest["tokens"])
    assert all(fields(source, "Stored") <= set(stored) for stored in manifest["files"].values())
    golden = json.loads((bundle.path / "golden.json").read_text())
    assert all(fields(source, "Golden") <= set(prompt) for prompt in golden)
    named = {name for text in SOURCES.values() for name in re.findall(r'"(\w+\.json)"', text)}
    assert named == {"manifest.json", "tokenizer.json", "golden.json"}
    assert named | set(manifest["artifact"]) <= {*manifest["files"], "manifest.json"}
