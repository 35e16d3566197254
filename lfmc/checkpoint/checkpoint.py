"""Opens a Hugging Face checkpoint, checks its tensors and loads them one at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lfmc.model import DecoderConfig, read_config
from lfmc.model.read_config import read_token_ids
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
DEMO_NAME = "lfm2-moe-8m"

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; names and shapes of its tensors match its configuration."""

    path: Path
    name: str
    config: DecoderConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __repr__(self) -> str:
        """Return one line, without the configuration and the hundreds of tensors."""
        model_type, size = self.config.model_type, f"{self.num_params:,} parameters"
        return f"<Checkpoint {self.name}: {model_type}, {size}, {len(self.tensors)} tensors>"

    @property
    def num_params(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `config.json` and all weight files: it identifies these exact weights."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted({info.file for info in self.tensors.values()}):
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

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
        return open_tokenizer(self.path)


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


def open_checkpoint(model: str | Path | None = None) -> Checkpoint:
    """Open a local folder, a hub id, or (with None) the small checkpoint that ships with lfmc.

    Read `config.json` and the headers of the weight files, but no weights. Raise `InputError` if
    the checkpoint does not exist, or if its tensors do not match its configuration.
    """
    path = demo_path() if model is None else Path(model)
    name = path.resolve().name
    if not path.exists() and _HUB_ID.fullmatch(str(model)):
        name = str(model).rpartition("/")[2]  # a folder in the cache is named by its commit
        path = _fetch(str(model))
    if not path.is_dir():
        raise InputError(
            "there is no such checkpoint",
            where=path,
            expected="a folder with config.json and *.safetensors, or a hub id like ORG/NAME",
        )
    path = path.resolve()
    config_path = path / "config.json"
    if not config_path.is_file():
        raise InputError("the folder contains no checkpoint", where=path, expected="config.json")
    raw = read_json(config_path)
    config = read_config(raw, str(config_path))
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(path):
        tensors.update(read_header(file))
    return Checkpoint(path, name, config, raw, _match(tensors, config, path))


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja"]
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
    """Return the decoder's tensors in its order; raise `InputError` if names or shapes differ."""
    shapes = tensor_shapes(config)
    extra = sorted(set(tensors) - set(shapes))
    if config.tied_embedding and {_HEAD, _EMBEDDING} <= tensors.keys():
        import torch

        extra.remove(_HEAD)
        head, table = (read_tensor(tensors[name]).float() for name in (_HEAD, _EMBEDDING))
        if not torch.equal(head, table):
            raise InputError(
                "the config ties the head to the embedding, but the weights contain another head",
                where=tensors[_HEAD].file,
                expected=f"no '{_HEAD}', or a copy of '{_EMBEDDING}'",
                todo="to use that head, set 'tie_word_embeddings' to false in config.json",
            )
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
    return {name: tensors[name] for name in shapes}


def _shorten(names: list[str]) -> str:
    text = ", ".join(names[:4])
    return (text or "none") + (", ..." if len(names) > 4 else "")
