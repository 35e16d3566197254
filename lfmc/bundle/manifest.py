"""The manifest: all facts about a bundle that an app or a person needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import describe_file
from lfmc.bundle.token_ids import special_tokens
from lfmc.checkpoint.chat_template import chat_prompt
from lfmc.checkpoint.sampling import read_sampling
from lfmc.lowering.build import Build
from lfmc.lowering.request import Options
from lfmc.machine.versions import tool_versions
from lfmc.targets.base import Artifact, Probe, StoredTensor
from lfmc.version import __version__


def build_manifest(
    export_build: Build,
    options: Options,
    artifact: Artifact,
    report: Mapping[str, Any],
    folder: Path,
    other_files: Sequence[str],
) -> dict[str, Any]:
    """Return the contents of `manifest.json` for an artifact in `folder`.

    `other_files` are the bundle's files besides the artifact's. `report` is the report of the
    export.
    """
    checkpoint, request = export_build.checkpoint, export_build.request
    config = checkpoint.config
    return {
        "lfmc": __version__,
        "target": export_build.target.name,
        "options": dict(request.options),
        "context": request.context,
        "check": options.check,
        # None: rung 4 ran on the bundled passages.
        "judged_on": None if options.text is None else describe_file(options.text),
        "not_executed": export_build.target.why_not_here(request),
        "model": {
            "name": checkpoint.name,
            "type": config.model_type,
            "fingerprint": checkpoint.fingerprint,
            "parameters": checkpoint.num_params,
            "vocab_size": config.vocab_size,
            "base_model": checkpoint.base_model,
            "adapter": None if checkpoint.adapter is None else checkpoint.adapter.name,
            "license": str(checkpoint.license),
        },
        "tokens": special_tokens(checkpoint),
        # What the authors of the model set for sampling; an app starts from these values.
        "sampling": read_sampling(checkpoint.path),
        "chat_prompt": chat_prompt(checkpoint, folder),
        # States can't be rewound: to drop the last tokens, an app resets and prefills again.
        "can_rewind": False,
        "artifact": list(artifact.files),
        "files": {name: describe_file(folder / name) for name in (*artifact.files, *other_files)},
        **artifact.facts,
        "report": report,
        "tensors": [asdict(tensor) for tensor in artifact.tensors],
        "probes": [asdict(probe) for probe in artifact.probes],
        "versions": tool_versions(),
    }


def artifact_from_manifest(manifest: Mapping[str, Any]) -> Artifact:
    """Return the artifact that a manifest describes."""
    tensors, probes = manifest["tensors"], manifest["probes"]
    return Artifact(
        tuple(manifest["artifact"]),
        tuple(StoredTensor(**{**raw, "sources": tuple(raw["sources"])}) for raw in tensors),
        tuple(Probe(**{**raw, "inputs": tuple(raw["inputs"])}) for raw in probes),
    )
