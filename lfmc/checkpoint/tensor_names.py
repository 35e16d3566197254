"""Names of the decoder's tensors in the files of other programs.

The decoder's own names are those on the hub: `model.layers.0.conv.in_proj.weight`. Some programs
omit `model.`, or store all experts of a layer as two packed tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_TOWER_PREFIXES = (
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(language_model\.)?(?=(layers|embed_tokens|embedding_norm)\.)"), "model."),
)
_ATTENTION_GATE = re.compile(r"(?<=\.self_attn)\.g_proj\.")  # of LFM3, in memory
_OTHER_TOWERS = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
_PACKED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
# Tensors that transformers ignores, too: rotary tables, and heads of training.
_UNUSED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|^(?!model\.|lm_head\.)")


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of one expert, in a packed tensor `[experts, rows, columns]`."""

    expert: int
    start: int
    stop: int

    def shape(self, packed: Sequence[int]) -> tuple[int, ...]:
        return (self.stop - self.start, packed[2])

    def read(self, stored: Any) -> Tensor:
        """Return the part as its own tensor; `stored` is a slice of an open safetensors file."""
        rows: Tensor = stored[self.expert, self.start : self.stop]
        return rows.contiguous()


def is_of_another_tower(disk_name: str) -> bool:
    """Return whether a tensor belongs to the vision part of a vision-language model."""
    return _OTHER_TOWERS.match(disk_name) is not None


def is_unused(name: str) -> bool:
    """Return whether a tensor that the decoder does not have can't change its output."""
    return _UNUSED.search(name) is not None


def decoder_name(disk_name: str) -> str:
    """Return the decoder's name of a tensor on disk."""
    name = disk_name
    for pattern, prefix in _TOWER_PREFIXES:
        name = pattern.sub(prefix, name)
    return _ATTENTION_GATE.sub(".gate_proj.", name)


def decoder_parts(disk_name: str, shape: Sequence[int]) -> Iterator[tuple[str, Part | None]]:
    """Yield the decoder's tensors that a tensor on disk stores: their names and parts.

    `gate_up_proj` `[E, 2 I, H]` stores `w1` above `w3` of each expert, `down_proj` `[E, H, I]`
    stores `w2` (`Lfm2MoeExperts` in transformers).
    """
    name = decoder_name(disk_name)
    packed = _PACKED.match(name)
    if packed is None or len(shape) != 3:
        yield name, None
        return
    experts, rows, _ = shape
    middle = rows // 2
    blocks = {"w1": (0, middle), "w3": (middle, rows)}
    if packed[2] == "down_proj":
        blocks = {"w2": (0, rows)}
    for expert in range(experts):
        for matrix, (start, stop) in blocks.items():
            yield f"{packed[1]}.{expert}.{matrix}.weight", Part(expert, start, stop)
