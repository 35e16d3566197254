"""Writes the model card, the license and the notice of changes of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.checkpoint.license import MODEL_CARD, License
from lfmc.lowering.build import Build
from lfmc.lowering.request import Options
from lfmc.version import __version__

NOTICE = "NOTICE"
# What the hub calls the runtime that loads a target's files.
LIBRARIES: Mapping[str, str] = {"coreml": "coreml", "executorch": "executorch", "onnx": "onnx"}


def write_legal_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy the license files of a checkpoint, and write a notice that lfmc changed the weights.

    Returns the names of the files. A notice of the checkpoint is part of the new one.
    """
    copied = [name for name in checkpoint.license.files if name != NOTICE]
    for name in copied:
        shutil.copyfile(checkpoint.path / name, folder / name)
    original = checkpoint.path / NOTICE
    text = original.read_text(encoding="utf-8", errors="replace") if original.is_file() else ""
    changes = (
        f"The weights in this folder are those of {checkpoint.base_model}, changed by lfmc "
        f"{__version__}: they are in another file format, in the number formats of plan.json.\n"
    )
    (folder / NOTICE).write_text(f"{text.rstrip()}\n\n{changes}".lstrip(), encoding="utf-8")
    return [*copied, NOTICE]


def write_model_card(
    export_build: Build, options: Options, report: Mapping[str, Any], folder: Path
) -> str:
    """Write the model card of a bundle: what it is, its size and quality, and how it was made.

    `report` is the report of the export. Returns the name of the file.
    """
    checkpoint, request = export_build.checkpoint, export_build.request
    target = export_build.target.name
    rows = {
        "model": f"{checkpoint.config.model_type}, {checkpoint.num_params:,} parameters",
        "quantized from": checkpoint.base_model,
        "target": " ".join([target, *(f"-O {k}={v}" for k, v in request.options.items())]),
        "context": f"{request.context:,} tokens",
        "size": f"{report['artifact_nbytes']:,} bytes, "
        f"{report['bits_per_weight']:.3f} bits per weight",
        **_quality_rows(report["quality"]),
        "verified": _verified(export_build, options),
    }
    lines = [
        *_front_matter(checkpoint, target),
        "",
        f"# {checkpoint.name} for {target}",
        "",
        f"{checkpoint.base_model}, quantized and exported by lfmc {__version__}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## How it was made",
        "",
        "```sh",
        _command(export_build, options),
        "```",
        "",
        "No calibration data was used. `plan.json` has the number format of every tensor, "
        "`manifest.json` has all measurements and the versions of all tools.",
        "",
        "## Use",
        "",
        "```sh",
        'lfmc generate . "Hello"',
        "```",
        "",
        "## License",
        "",
        _license_text(checkpoint.license),
        "",
    ]
    (folder / MODEL_CARD).write_text("\n".join(lines), encoding="utf-8")
    return MODEL_CARD


def _front_matter(checkpoint: Checkpoint, target: str) -> list[str]:
    """Return the metadata that the hub reads."""
    license = checkpoint.license
    base = checkpoint.hub_id or license.base_model
    metadata = {
        "license": license.identifier,
        "license_name": license.name,
        "license_link": license.link,
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "library_name": LIBRARIES.get(target),
        "pipeline_tag": "text-generation",
    }
    stated: dict[str, Any] = {key: value for key, value in metadata.items() if value is not None}
    stated["tags"] = ["lfmc", checkpoint.config.model_type, target]
    return ["---", yaml.safe_dump(stated, sort_keys=False).rstrip(), "---"]


def _quality_rows(quality: Mapping[str, Any] | None) -> dict[str, str]:
    if quality is None:
        return {"quality": "not measured"}
    return {
        "KL to the original": f"{quality['kl']:.4f} nats per token",
        "same most likely token": f"{100 * quality['top1']:.1f} %",
        "perplexity": f"{quality['perplexity']:.3f} "
        f"(original {quality['reference_perplexity']:.3f})",
    }


def _verified(export_build: Build, options: Options) -> str:
    reason = export_build.target.why_not_here(export_build.request)
    if options.check == "off":
        return "no"
    if reason is not None:
        return f"the weights and the graph; the files were not executed: {reason}"
    return "the files were executed and compared with the original"


def _command(export_build: Build, options: Options) -> str:
    """Return the command that makes this bundle."""
    checkpoint, plan = export_build.checkpoint, export_build.plan
    parts = ["lfmc export", checkpoint.base_model, f"--target {export_build.target.name}"]
    if checkpoint.adapter is not None:
        parts.append(f"--adapter {checkpoint.adapter.name}")
    if options.plan is not None:
        parts.append("--plan plan.json")
    else:
        parts.append(f"--bits {plan.method}")
        parts += [f"--max-size {plan.limit_nbytes}B"] if plan.limit_nbytes is not None else []
        parts += [f"--effort {plan.effort}"] if plan.effort != "fast" else []
        parts += [f"--seed {plan.seed}"] if plan.seed else []
    parts.append(f"--context {export_build.request.context}")
    parts += [f"-O {name}={value}" for name, value in options.target_options.items()]
    return " ".join(parts)


def _license_text(license: License) -> str:
    link = f" ({license.link})" if license.link else ""
    files = f" The files {', '.join(license.files)} are copies." if license.files else ""
    return f"The license of the original model applies: {license}{link}.{files}"
