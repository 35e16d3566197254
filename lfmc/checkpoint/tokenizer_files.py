"""Copies the tokenizer files of a checkpoint into a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfmc.checkpoint.chat_template import DEFAULT, OTHER_TEMPLATES, TEMPLATE, read_templates
from lfmc.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from lfmc.checkpoint.weight_files import read_json, read_text


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy tokenizer, chat templates and configurations; return the names of the files.

    `tokenizer_class` becomes `PreTrainedTokenizerFast`: swift-transformers and transformers.js
    refuse other names, and the vocabulary is in `tokenizer.json` anyway. Chat templates in JSON
    files are written to their own files, because some readers look only there. Raises `InputError`
    if the checkpoint has no `tokenizer.json`, or a file that can't be read.
    """
    checkpoint.tokenizer()
    texts = {
        name: read_text(checkpoint.path / name)
        for name in TOKENIZER_FILES
        if (checkpoint.path / name).is_file()
    }
    templates = read_templates(checkpoint.path)
    for name, template in templates.items():
        texts[TEMPLATE if name == DEFAULT else f"{OTHER_TEMPLATES}/{name}.jinja"] = template
    if "tokenizer_config.json" in texts:
        settings = read_json(checkpoint.path / "tokenizer_config.json")
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if not isinstance(settings.get("chat_template", ""), str):
            del settings["chat_template"]  # several templates, now in files
        texts["tokenizer_config.json"] = _to_text(settings)
    texts["config.json"] = read_text(checkpoint.path / "config.json")
    if json.loads(texts["config.json"]) != checkpoint.raw_config:
        texts["config.json"] = _to_text(dict(checkpoint.raw_config))  # an adapter changed it
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return list(texts)


def add_settings(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Add keys to the JSON files of a folder; return the names of the files that are new."""
    new = [name for name in settings if not (folder / name).is_file()]
    for name, values in settings.items():
        existing = {} if name in new else read_json(folder / name)
        (folder / name).write_text(_to_text({**existing, **values}), encoding="utf-8")
    return new


def _to_text(value: dict[str, object]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
