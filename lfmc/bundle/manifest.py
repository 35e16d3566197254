"""The manifest: everything an app, or a person, needs to know of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfmc.bundle.bundle import describe
from lfmc.bundle.token_ids import special_tokens
from lfmc.checkpoint.chat_template import chat_prompt
from lfmc.lowering.build import Build
from lfmc.lowering.request import Options
from lfmc.machine.versions import tool_versions
from lfmc.targets.base import Artifact, Probe, StoredTensor
from lfmc.version import __version__


def manifest(
    made: Build,
    options: Options,
    artifact: Artifact,
    report: Mapping[str, Any],
    folder: Path,
    beside: Sequence[str],
) -> dict[str, Any]:
    """What `manifest.json` holds for an artifact in `folder`; `beside` are the bundle's other
    files, and `report` is what the export measured."""
    checkpoint, asked = made.checkpoint, made.asked
    config = checkpoint.config
    return {
        "lfmc": __version__,
        "target": made.target.name,
        "options": dict(asked.options),
        "context": asked.context,
        "check": options.check,
        "judged_on": None if options.text is None else describe(options.text),  # None: passages
        "not_executed": made.target.why_not_here(asked),
        "model": {
            "name": checkpoint.name,
            "type": config.model_type,
            "fingerprint": checkpoint.fingerprint,
            "parameters": checkpoint.num_params,
            "vocab_size": config.vocab_size,
        },
        "tokens": special_tokens(checkpoint),
        "chat_prompt": chat_prompt(checkpoint, folder),
        # States can't be rewound: drop the last tokens by a reset and a new prefill.
        "can_rewind": False,
        "artifact": list(artifact.files),
        "files": {name: describe(folder / name) for name in (*artifact.files, *beside)},
        **artifact.facts,
        "report": report,
        "tensors": [asdict(tensor) for tensor in artifact.tensors],
        "probes": [asdict(probe) for probe in artifact.probes],
        "versions": tool_versions(),
    }


def described_artifact(told: Mapping[str, Any]) -> Artifact:
    """The artifact as its manifest describes it."""
    return Artifact(
        tuple(told["artifact"]),
        tuple(StoredTensor(**{**t, "sources": tuple(t["sources"])}) for t in told["tensors"]),
        tuple(Probe(**{**p, "inputs": tuple(p["inputs"])}) for p in told["probes"]),
    )
