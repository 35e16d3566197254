"""Opens a Hugging Face checkpoint, checks its tensors and loads them one at a time."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfmc.checkpoint.adapter import ADAPTER_CONFIG, adapter_files, merge_adapter
from lfmc.checkpoint.license import LICENSE_FILES, MODEL_CARD, License, read_license
from lfmc.checkpoint.tensor_names import EMBEDDING, HEAD, is_unused
from lfmc.checkpoint.tokenizer import open_tokenizer
from lfmc.checkpoint.weight_files import (
    LazyTensors,
    TensorInfo,
    read_header,
    read_json,
    read_tensor,
    weight_files,
)
from lfmc.errors import InputError, first_line
from lfmc.machine.file_digest import sha256_of_files
from lfmc.model import DecoderConfig, read_config
from lfmc.model.config_section import read_token_ids
from lfmc.model.tensor_shapes import tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from lfmc.model import Decoder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
SENTENCE_MODEL = "modules.json"
DEMO_NAME = "lfm2-moe-8m"

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; names and shapes of its tensors match its configuration.

    `adapter` is the folder of a LoRA adapter that is merged into the tensors, or None. `hub_id` is
    the id that the checkpoint was opened with, or None for a folder.
    """

    path: Path
    name: str
    config: DecoderConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    adapter: Path | None = None
    hub_id: str | None = None

    def __repr__(self) -> str:
        """Return one line, without the configuration and the hundreds of tensors."""
        model_type, size = self.config.model_type, f"{self.num_params:,} parameters"
        return f"<Checkpoint {self.name}: {model_type}, {size}, {len(self.tensors)} tensors>"

    @property
    def base_model(self) -> str:
        """The model that an export is made from: its hub id, or the name of its folder."""
        return self.hub_id or self.name

    @cached_property
    def license(self) -> License:
        return read_license(self.path)

    @property
    def num_params(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `config.json` and all weight files: it identifies these exact weights."""
        files = {info.file for info in self.tensors.values()}
        if self.adapter is not None:
            files |= adapter_files(self.adapter)
        return sha256_of_files([self.path / "config.json", *sorted(files)])

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply, from `config.json` and `generation_config.json`."""
        return stop_ids(self.config, self.path)

    def load(self, name: str) -> Tensor:
        """Load a tensor in its stored dtype; raise `InputError` if it contains NaN or infinity."""
        import torch

        info = self.tensors[name]
        tensor = read_tensor(info)
        extrema = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # keeps NaN
        if not torch.isfinite(extrema).all():
            num_bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"tensor '{name}' contains values that are not finite",
                where=info.file,
                expected="finite numbers",
                got=f"{num_bad} of {tensor.numel()} are NaN or infinite",
                todo="repair the checkpoint; these values can't be quantized",
            )
        return tensor

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All tensors in their stored dtypes; each is read when it is accessed."""
        return LazyTensors(self.tensors, self.load)

    def decoder(self, weights: Mapping[str, Tensor] | None = None) -> Decoder:
        """Return the float32 decoder with all weights; `weights` replace tensors by name."""
        from lfmc.model import build_decoder
        from lfmc.model.experts import SparseMoe

        decoder = build_decoder(self.config)
        for module in decoder.modules():
            if isinstance(module, SparseMoe):
                module.only_chosen = True
        constants = {k: v for k, v in decoder.state_dict().items() if k.startswith("rope.")}
        replacements = weights or {}
        tensors = {
            name: (replacements[name] if name in replacements else self.load(name)).float()
            for name in self.tensors
        }
        decoder.load_state_dict({**constants, **tensors}, assign=True)
        return decoder.requires_grad_(False)

    def tokenizer(self) -> Any:
        """Return the `tokenizers.Tokenizer`; raise `InputError` if it is missing or broken."""
        if not (self.path / "tokenizer.json").is_file():
            raise InputError(
                "the checkpoint has no tokenizer",
                where=self.path,
                expected="tokenizer.json",
                todo="copy the tokenizer files of the model into this folder",
            )
        tokenizer = open_tokenizer(self.path)
        last_id = max(tokenizer.get_vocab().values(), default=0)
        if last_id >= self.config.vocab_size:
            raise InputError(
                "the tokenizer has tokens that the embedding does not have",
                where=self.path / "tokenizer.json",
                expected=f"ids below {self.config.vocab_size}, the rows of the embedding",
                got=f"'{tokenizer.id_to_token(last_id)}' with id {last_id}",
                todo="resize the embedding of the model, or use the tokenizer that belongs to it",
            )
        return tokenizer


def stop_ids(config: DecoderConfig, folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a reply, from a configuration and `generation_config.json`."""
    ids = list(config.eos_ids)
    path = folder / "generation_config.json"
    if path.is_file():
        eos_ids = read_json(path).get("eos_token_id")
        ids += read_token_ids(eos_ids, "eos_token_id", str(path))
    return tuple(dict.fromkeys(ids))


def demo_path() -> Path:
    """Return the folder of the small checkpoint that ships with the package."""
    return Path(str(files("lfmc") / "demo" / DEMO_NAME))


def open_checkpoint(
    model: str | Path | None = None, adapter: str | Path | None = None
) -> Checkpoint:
    """Open a local folder, a hub id, or (with None) the small checkpoint that ships with lfmc.

    `adapter` is the folder or hub id of a LoRA adapter of this model, which is merged. Read
    `config.json` and the headers of the weight files, but no weights. Raise `InputError` if the
    checkpoint does not exist, or if its tensors do not match its configuration. Log a warning for
    parts of the checkpoint that are not used.
    """
    path, hub_id = (demo_path(), None) if model is None else _find(model)
    name = path.name if hub_id is None else hub_id.rpartition("/")[2]  # not the commit's name
    config_path = path / "config.json"
    if not config_path.is_file():
        _refuse_lone_adapter(path)
        raise InputError("the folder contains no checkpoint", where=path, expected="config.json")
    if adapter is None and (path / ADAPTER_CONFIG).is_file():
        raise InputError(
            "the folder contains a LoRA adapter beside the weights",
            where=path / ADAPTER_CONFIG,
            todo=f"--adapter {path} merges it; to export without it, move it to another folder",
        )
    if (path / SENTENCE_MODEL).is_file():
        raise InputError(
            "the checkpoint is not a causal language model",
            where=path / SENTENCE_MODEL,
            expected="a model that predicts the next token",
            got="a sentence-transformers model, which computes embeddings of text",
        )
    raw = read_json(config_path)
    config = read_config(raw, str(config_path))
    _require_known_tokens(config, raw, config_path)
    if raw.get("quantization_config"):
        _log.warning("'quantization_config' in config.json is not used: the weights are floats")
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(path):
        tensors.update(read_header(file))
    tensors = _scale_rotated(_match(tensors, config, path), config)
    checkpoint = Checkpoint(path, name, config, raw, tensors, hub_id=hub_id)
    if adapter is None:
        return checkpoint
    folder, _ = _find(adapter)
    merged = merge_adapter(folder, config, raw, tensors)
    return replace(
        checkpoint,
        config=merged.config,
        raw_config=merged.raw_config,
        tensors=merged.tensors,
        adapter=folder,
    )


def _find(model: str | Path) -> tuple[Path, str | None]:
    """Return a folder, and its hub id if it is in the hub's cache; raise `InputError`."""
    path = Path(model)
    if not path.exists() and _HUB_ID.fullmatch(str(model)):
        return _fetch(str(model)).resolve(), str(model)
    if not path.is_dir():
        raise InputError(
            "there is no such checkpoint",
            where=path,
            expected="a folder with config.json and *.safetensors, or a hub id like ORG/NAME",
        )
    return path.resolve(), None


def _refuse_lone_adapter(path: Path) -> None:
    """Raise `InputError` if a folder contains a LoRA adapter without its base model."""
    if (path / ADAPTER_CONFIG).is_file():
        base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise InputError(
            "the folder contains a LoRA adapter, but no model",
            where=path,
            expected="the base model, with the adapter as an option",
            todo=f"lfmc export {base or 'BASE_MODEL'} --adapter {path}",
        )


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", MODEL_CARD, *LICENSE_FILES]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputError(
            "the model is neither a local folder nor on the hub (or in its local cache)",
            where=hub_id,
            got=first_line(error),
            todo="check the name, the network, or HF_HOME; or pass a local folder",
        ) from error


def _match(
    tensors: Mapping[str, TensorInfo], config: DecoderConfig, path: Path
) -> dict[str, TensorInfo]:
    """Return the decoder's tensors in its order; raise `InputError` if names or shapes differ.

    Log a warning for tensors that the decoder does not use.
    """
    shapes = tensor_shapes(config)
    extra = sorted(set(tensors) - set(shapes))
    if config.tied_embedding and {HEAD, EMBEDDING} <= tensors.keys():
        import torch

        extra.remove(HEAD)
        head, table = (read_tensor(tensors[name]).float() for name in (HEAD, EMBEDDING))
        if not torch.equal(head, table):
            raise InputError(
                "the config ties the head to the embedding, but the weights contain another head",
                where=tensors[HEAD].file,
                expected=f"no '{HEAD}', or a copy of '{EMBEDDING}'",
                todo="to use that head, set 'tie_word_embeddings' to false in config.json",
            )
    unused = [name for name in extra if is_unused(name)]
    extra = [name for name in extra if name not in unused]
    missing = sorted(set(shapes) - set(tensors))
    if missing or extra:
        raise InputError(
            "config.json does not match the weights",
            where=path,
            expected=f"{len(missing)} tensors that are missing: {_shorten(missing)}",
            got=f"{len(extra)} tensors that config.json does not describe: {_shorten(extra)}",
            todo="check layer_types, num_hidden_layers and the other sizes in config.json",
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"tensor '{name}' does not have the shape that config.json specifies",
                where=tensors[name].file,
                expected=list(shape),
                got=list(tensors[name].shape),
            )
    if unused:
        _log.warning(
            "%d tensors are not part of the decoder and are not exported: %s",
            len(unused),
            _shorten(unused),
        )
    return {name: tensors[name] for name in shapes}


def _require_known_tokens(
    config: DecoderConfig, raw_config: Mapping[str, Any], where: Path
) -> None:
    """Raise `InputError` if `config.json` names a special token outside the vocabulary."""
    text_config = raw_config.get("text_config")
    stated = text_config if isinstance(text_config, dict) else raw_config
    tokens = {
        "bos_token_id": (config.bos_id,),
        "eos_token_id": config.eos_ids,
        "pad_token_id": (config.pad_id,),
    }
    for key, ids in tokens.items():
        for token in ids:
            if key in stated and token is not None and token >= config.vocab_size:
                raise InputError(
                    f"config.json: '{key}' is outside the vocabulary",
                    where=where,
                    expected=f"below {config.vocab_size}",
                    got=token,
                )


def _scale_rotated(
    tensors: Mapping[str, TensorInfo], config: DecoderConfig
) -> dict[str, TensorInfo]:
    """Return the tensors with a rotary embedding's gain in the query and key norms.

    YaRN multiplies rotated queries and keys by a constant. Norms are directly before the rotation,
    so their gains can contain it, and targets need no code for it.
    """
    scaled = dict(tensors)
    for layer, kind in enumerate(config.layer_types):
        gain = config.rope[kind].gain if kind in config.rope else 1.0
        for norm in (config.attention_names.q_norm, config.attention_names.k_norm):
            name = f"model.layers.{layer}.self_attn.{norm}.weight"
            if gain != 1.0:
                scaled[name] = replace(tensors[name], gain=gain, stored_dtype="F32")
    return scaled


def _shorten(names: list[str]) -> str:
    text = ", ".join(names[:4])
    return (text or "none") + (", ..." if len(names) > 4 else "")
