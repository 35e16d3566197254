"""Reading a Hugging Face checkpoint: names and shapes first, then one tensor at a time.

Tensor names are those on disk; a vision-language checkpoint's language tower is read under the
names that it has on its own (`model.layers.0...`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfmc.errors import InputError, first_line
from lfmc.model import Decoder, DecoderConfig, build_decoder, read_config
from lfmc.model.config import read_token_ids
from lfmc.model.experts import SparseMoe

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DEMO_NAME = "lfm2-moe-8m"

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOWER_PREFIXES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
)
_OTHER_TOWERS = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor, without its data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    disk_name: str

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made whenever it is asked for: nothing is kept."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors have been checked, by name and shape, against its configuration."""

    path: Path
    name: str
    config: DecoderConfig
    raw_config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def num_params(self) -> int:
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over `config.json` and every weight file: one name for exactly these weights."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted({info.file for info in self.tensors.values()}):
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a reply: those of `config.json` and `generation_config.json`."""
        return stop_ids(self.config, self.path)

    def load(self, name: str) -> Tensor:
        """One tensor in its stored dtype; raises `InputError` where it holds NaN or infinity."""
        info = self.tensors[name]
        tensor = read_tensor(info)
        ends = torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor  # NaN stays NaN
        if not torch.isfinite(ends).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"tensor '{name}' holds values that are not finite",
                where=info.file,
                expected="finite numbers",
                got=f"{bad} of {tensor.numel()} are NaN or infinite",
                todo="repair the checkpoint; there is no right way to round these",
            )
        return tensor

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All tensors in their stored dtypes, read when asked for."""
        return LazyTensors(self.tensors, self.load)

    def decoder(self, weights: Mapping[str, Tensor] | None = None) -> Decoder:
        """The float32 decoder of this checkpoint, to run; `weights` replace tensors by name."""
        decoder = build_decoder(self.config)
        for module in decoder.modules():
            if isinstance(module, SparseMoe):
                module.only_chosen = True
        constants = {k: v for k, v in decoder.state_dict().items() if k.startswith("rope.")}
        replaced = weights or {}
        loaded = {
            name: (replaced[name] if name in replaced else self.load(name)).float()
            for name in self.tensors
        }
        decoder.load_state_dict({**constants, **loaded}, assign=True)
        return decoder.requires_grad_(False)

    def tokenizer(self) -> Any:
        """The checkpoint's `tokenizers.Tokenizer`; raises `InputError` where it has none."""
        from tokenizers import Tokenizer

        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise InputError(
                "the checkpoint has no tokenizer",
                where=self.path,
                expected="tokenizer.json",
                todo="copy the tokenizer files of the model into this folder",
            )
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InputError("the tokenizer can't be read", where=path, got=error) from error


def stop_ids(config: DecoderConfig, folder: Path) -> tuple[int, ...]:
    """Every token that ends a reply, by a configuration and `generation_config.json` beside it."""
    ids = list(config.eos_ids)
    path = folder / "generation_config.json"
    if path.is_file():
        more = _read_json(path).get("eos_token_id")
        ids += read_token_ids(more, "eos_token_id", str(path))
    return tuple(dict.fromkeys(ids))


def demo_path() -> Path:
    """Where the small checkpoint that ships with the package lies."""
    return Path(str(files("lfmc") / "demo" / DEMO_NAME))


def open_checkpoint(model: str | Path | None = None) -> Checkpoint:
    """Open a local folder, a hub id, or (with None) the small checkpoint that ships with lfmc.

    Reads `config.json` and the headers of the weight files, no weights. Raises `InputError` when
    there is no such checkpoint, or when its tensors and its configuration disagree.
    """
    path = demo_path() if model is None else Path(model)
    name = path.resolve().name
    if not path.exists() and _HUB_ID.fullmatch(str(model)):
        name = str(model).rpartition("/")[2]  # the folder in the cache is called by its commit
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
        raise InputError("the folder holds no checkpoint", where=path, expected="config.json")
    raw = _read_json(config_path)
    config = read_config(raw, str(config_path))
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        tensors.update(_read_header(file))
    return Checkpoint(path, name, config, raw, _match(tensors, config, path))


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise InputError(
            "the model is neither a folder here nor in the hub (or its local cache)",
            where=hub_id,
            got=first_line(error),
            todo="check the name, the network, or HF_HOME; or give a local folder",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, 5000 digits
        raise InputError(f"{path.name} can't be read", where=path, got=error) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=path)
    return value


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError("the weight index names no files", where=index, expected="weight_map")
        found = sorted(set(map(str, names.values())))
        for name in found:
            if Path(name).name != name or "\\" in name:
                raise InputError(
                    "the weight index points outside its folder",
                    where=index,
                    expected="plain file names",
                    got=repr(name),
                )
            if not (path / name).is_file():
                raise InputError("a weight file is missing", where=path / name)
        return [path / name for name in found]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern))
    if pickles:
        raise InputError(
            "the weights are Python pickles, which lfmc never loads: they can run code",
            where=path,
            expected=f"{SINGLE} or {INDEX}",
            got=", ".join(pickles),
            todo="convert them with safetensors where they are trusted",
        )
    raise InputError("the folder has no weights", where=path, expected=f"{SINGLE} or {INDEX}")


def _read_header(file: Path) -> dict[str, TensorInfo]:
    found = {}
    try:
        with safe_open(file, "pt") as stream:
            for disk_name in stream.keys():  # noqa: SIM118 (not a mapping)
                piece = stream.get_slice(disk_name)
                name = disk_name
                for pattern, plain in _TOWER_PREFIXES:
                    name = pattern.sub(plain, name)
                if _OTHER_TOWERS.match(name):
                    continue
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise InputError(
                        f"tensor '{name}' has a dtype that lfmc does not quantize from",
                        where=file,
                        expected=", ".join(DTYPES),
                        got=piece.get_dtype(),
                    )
                shape = tuple(piece.get_shape())
                found[name] = TensorInfo(name, shape, dtype, file, disk_name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            "a weight file is truncated or corrupted",
            where=file,
            got=error,
            todo="download it again",
        ) from error
    return found


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor as it lies on disk, unchecked: its file is mapped, and read where it is touched."""
    try:
        with safe_open(info.file, "pt") as stream:
            tensor: Tensor = stream.get_tensor(info.disk_name)
    except (SafetensorError, OSError) as error:
        raise InputError("a weight file can't be read", where=info.file, got=error) from error
    return tensor


def _match(
    tensors: Mapping[str, TensorInfo], config: DecoderConfig, path: Path
) -> dict[str, TensorInfo]:
    """The tensors of the decoder, in its order; raises where they are not what the config says."""
    wanted = {
        name: tuple(value.shape)
        for name, value in build_decoder(config).state_dict().items()
        if not name.startswith("rope.")
    }
    extra = sorted(set(tensors) - set(wanted))
    if config.tied_embedding and {_HEAD, _EMBEDDING} <= tensors.keys():
        extra.remove(_HEAD)
        head, table = (read_tensor(tensors[name]).float() for name in (_HEAD, _EMBEDDING))
        if not torch.equal(head, table):
            raise InputError(
                "the config ties the head to the embedding, but the weights hold another head",
                where=tensors[_HEAD].file,
                expected=f"no '{_HEAD}', or a copy of '{_EMBEDDING}'",
                todo="set 'tie_word_embeddings' to false in config.json if the head is meant",
            )
    missing = sorted(set(wanted) - set(tensors))
    if missing or extra:
        raise InputError(
            "config.json and the weights disagree",
            where=path,
            expected=f"{len(missing)} tensors that are missing: {_some(missing)}",
            got=f"{len(extra)} tensors that the config has no place for: {_some(extra)}",
            todo="check layer_types, num_hidden_layers and the other sizes in config.json",
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"tensor '{name}' does not have the shape that config.json gives it",
                where=tensors[name].file,
                expected=list(shape),
                got=list(tensors[name].shape),
            )
    return {name: tensors[name] for name in wanted}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return (shown or "none") + (", ..." if len(names) > 4 else "")
