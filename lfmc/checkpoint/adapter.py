"""Merges a LoRA adapter (Hu et al. 2021), as peft saves it, into the tensors of a checkpoint.

A merged matrix is `W + scale * B A`, computed in float32 when the matrix is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfmc.checkpoint.tensor_names import EMBEDDING, HEAD, decoder_name
from lfmc.checkpoint.weight_files import LowRank, TensorInfo, read_json, read_stored
from lfmc.errors import InputError
from lfmc.model import DecoderConfig
from lfmc.model.config_section import Section

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
# `base_layer`: peft stores an embedding together with its adapter.
_COPY = re.compile(r"^(?P<module>.+?)(\.base_layer|\.modules_to_save(\.default)?)?\.weight$")
# Settings that change the arithmetic in ways that a merged matrix of this module can't express.
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
)


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter by the name of the decoder's tensor that they change.

    `copies` replace tensors, then `low_rank` are added. `ties_weights` means that the embedding and
    the head have the same adapter.
    """

    low_rank: Mapping[str, LowRank]
    copies: Mapping[str, TensorInfo]
    ties_weights: bool


def adapter_files(folder: Path) -> set[Path]:
    """Return the files that determine an adapter."""
    return {folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS}


@dataclass(frozen=True)
class MergedModel:
    """A configuration and its tensors, with an adapter."""

    config: DecoderConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def merge_adapter(
    folder: Path,
    config: DecoderConfig,
    raw_config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> MergedModel:
    """Merge the adapter in `folder` into the tensors of a checkpoint.

    A tied embedding is untied if the adapter changes only the embedding or only the head, because
    the adapted model then has two different matrices. Raises `InputError` if the adapter does not
    fit the checkpoint, or if it is not a LoRA adapter that a merged matrix can express.
    """
    adapter = read_adapter(folder)
    merged = dict(tensors)
    names = {*adapter.low_rank, *adapter.copies}
    if config.tied_embedding and adapter.ties_weights:
        names -= {HEAD}  # peft stores the adapter of the embedding for both
    elif config.tied_embedding and {HEAD, EMBEDDING} & names:
        merged[HEAD] = replace(tensors[EMBEDDING], name=HEAD)
        config = replace(config, tied_embedding=False)
        untied = [key for key in ("tie_word_embeddings", "tie_embedding") if key in raw_config]
        raw_config = {**raw_config, **dict.fromkeys(["tie_word_embeddings", *untied], False)}
    unknown = sorted(names - set(merged))
    if unknown:
        raise InputError(
            "the adapter changes tensors that the checkpoint does not have",
            where=folder,
            expected="an adapter of this model",
            got=f"{len(unknown)} such tensors: {', '.join(unknown[:4])}",
        )
    for name in sorted(names):
        base, copy, low_rank = merged[name], adapter.copies.get(name), adapter.low_rank.get(name)
        for change in (copy, low_rank):
            if change is not None and change.shape != base.shape:
                raise InputError(
                    f"the adapter's change of '{name}' has another shape than the tensor",
                    where=folder,
                    expected=list(base.shape),
                    got=list(change.shape),
                )
        if copy is not None:
            merged[name] = replace(copy, name=name, gain=base.gain)
        if low_rank is not None:
            merged[name] = replace(merged[name], stored_dtype="F32", adapter=low_rank)
    return MergedModel(config, raw_config, merged)


def read_adapter(folder: Path) -> Adapter:
    """Read the configuration and the headers of an adapter; raise `InputError` if it can't be."""
    for file in sorted(adapter_files(folder)):
        if not file.is_file():
            raise InputError(
                "the folder contains no LoRA adapter", where=folder, expected=file.name
            )
    raw = read_json(folder / ADAPTER_CONFIG)
    _require_plain_lora(raw, folder)
    section = Section(raw, str(folder / ADAPTER_CONFIG))
    sides: dict[str, dict[str, TensorInfo]] = {}
    copies: dict[str, TensorInfo] = {}
    embeddings: set[str] = set()
    for info in read_stored(folder / ADAPTER_WEIGHTS):
        disk_name = info.disk_name.removeprefix(_PREFIX)
        if ".experts." in disk_name:
            raise InputError(
                "the adapter changes experts, which lfmc can't merge",
                where=folder,
                todo="merge it with peft's merge_and_unload, save the model, and export that",
            )
        matrix, copy = _MATRIX.match(disk_name), _COPY.match(disk_name)
        if matrix is not None:
            name = decoder_name(f"{matrix['module']}.weight")
            sides.setdefault(name, {})[matrix["side"]] = info
            if matrix["embedding"]:
                embeddings.add(name)
        elif copy is not None and ".lora_" not in disk_name:
            copies[decoder_name(f"{copy['module']}.weight")] = info
        else:
            raise InputError(
                f"the adapter has a tensor that can't be merged: '{info.disk_name}'",
                where=folder / ADAPTER_WEIGHTS,
                expected="lora_A and lora_B of linear layers and embeddings, or whole weights",
            )
    low_rank = {}
    for name, pair in sides.items():
        if pair.keys() != {"A", "B"} or any(len(info.shape) != 2 for info in pair.values()):
            raise InputError(
                f"the adapter of '{name}' is not a pair of matrices lora_A and lora_B",
                where=folder / ADAPTER_WEIGHTS,
                got=", ".join(f"lora_{side} {list(pair[side].shape)}" for side in sorted(pair)),
            )
        transposed = name in embeddings
        low_rank[name] = LowRank(pair["A"], pair["B"], _scale(section, name, pair["A"]), transposed)
    ties = section.get("ensure_weight_tying", bool, False)
    return Adapter(low_rank, copies, ties)


def _require_plain_lora(raw: Mapping[str, Any], folder: Path) -> None:
    """Raise `InputError` for other kinds of adapters than LoRA with plain matrices."""
    if raw.get("peft_type") != "LORA":
        raise InputError(
            "this kind of adapter can't be merged",
            where=folder / ADAPTER_CONFIG,
            expected="peft_type 'LORA'",
            got=repr(raw.get("peft_type"))[:80],
        )
    unsupported = [key for key in _UNSUPPORTED if raw.get(key)]
    if raw.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise InputError(
            "the adapter has settings that lfmc can't merge",
            where=folder / ADAPTER_CONFIG,
            got=", ".join(unsupported),
            todo="merge it with peft's merge_and_unload, save the model, and export that",
        )


def _scale(section: Section, name: str, a: TensorInfo) -> float:
    """Return the factor of `B A`: alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA."""
    module = name.removesuffix(".weight")
    rank = _by_pattern(section, "rank_pattern", module, section.positive("r"))
    alpha = _by_pattern(section, "alpha_pattern", module, section.number("lora_alpha", 8))
    if a.shape[0] != rank:
        raise InputError(
            f"the adapter of '{name}' has another rank than {ADAPTER_CONFIG} states",
            where=a.file,
            expected=rank,
            got=a.shape[0],
        )
    stabilized = section.get("use_rslora", bool, False)
    return float(alpha / (math.sqrt(rank) if stabilized else rank))


def _by_pattern(section: Section, key: str, module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, as in peft."""
    patterns = section.raw.get(key) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.match(rf".*\.({pattern})$|^({pattern})$", module):
            return Section({key: value}, section.where).number(key, default)
    return default
