"""The role of each stored tensor in the model, and the units of tensors that share a format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lfmc.calib_free.grid.formats import Capabilities
from lfmc.checkpoint.checkpoint import Checkpoint

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Roles that take part in allocation, and roles that stay floating point with the reason for the
# plan.
QUANTIZED_ROLES = ("embedding", "head", "linear", "expert")
FLOAT_ROLES: Mapping[str, str] = {
    "router": "float: a rounded router sends tokens to other experts",
    "expert_bias": "float: it decides which experts are chosen",
    "norm": "float: small and sensitive",
    "conv": "float: small and sensitive",
    "gate": "float: one row per head, small and sensitive",
    "bias": "float: small and sensitive",
}

# Leaf modules of every `nn.Linear` in `lfmc.model` except the head and the gate.
_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "in_proj", "w1", "w2", "w3")
_EXPERT = re.compile(r"(model\.layers\.\d+\.feed_forward\.experts)\.(\d+)\.(w[123])\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Unit:
    """Tensors that must share one format; `layer` is None outside the layers.

    `experts` names the sparse layer (`model.layers.2.feed_forward.experts`) of an expert unit.
    """

    names: tuple[str, ...]
    role: str
    layer: int | None
    experts: str | None = None

    @property
    def kind(self) -> str:
        """The name of the unit within its layer, such as `conv.in_proj` or `experts.w1+w3`."""
        if self.experts is not None:
            leaves = sorted({name.split(".")[-2] for name in self.names})
            return "experts." + "+".join(leaves)
        if self.layer is None:
            return self.role
        paths = [name.split(".", 3)[3].removesuffix(".weight") for name in self.names]
        return "+".join([paths[0], *(path.rsplit(".", 1)[-1] for path in paths[1:])])


def tensor_role(name: str, shape: tuple[int, ...]) -> str:
    """Return the role of a tensor from its name on disk and its shape.

    The role is one of `QUANTIZED_ROLES` or `FLOAT_ROLES`. Raises `ValueError` for a tensor that no
    LFM decoder has; a `Checkpoint` contains no such tensor.
    """
    if name == EMBEDDING:
        return "embedding"
    if name == HEAD:
        return "head"
    if _EXPERT.fullmatch(name):
        return "expert"
    module, leaf = name.split(".")[-2:]
    if leaf == "expert_bias":
        return "expert_bias"
    if leaf == "bias":
        return "bias"
    if module.endswith("norm") and len(shape) == 1:
        return "norm"
    if module == "conv" and len(shape) == 3:
        return "conv"
    if module == "gate" and ".feed_forward." in name:
        return "router"
    if module == "gate_proj":
        return "gate"
    if module in _LINEARS and len(shape) == 2:
        return "linear"
    raise ValueError(f"tensor '{name}' of shape {list(shape)} has no known role")


def quantization_units(checkpoint: Checkpoint, capabilities: Capabilities) -> list[Unit]:
    """Group the quantizable tensors of a checkpoint as the target requires, in checkpoint order."""
    names_by_key: dict[tuple[object, ...], list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if tensor_role(name, info.shape) in QUANTIZED_ROLES:
            names_by_key.setdefault(_group_key(name, capabilities), []).append(name)
    return [_build_unit(checkpoint, tuple(names), capabilities) for names in names_by_key.values()]


def _group_key(name: str, capabilities: Capabilities) -> tuple[object, ...]:
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        parent, module, _ = name.rsplit(".", 2) if name.count(".") > 1 else ("", name, "")
        projections = next((group for group in capabilities.merged if module in group), None)
        return (name,) if projections is None else (parent, projections)
    layer, index, leaf = expert.groups()
    if capabilities.expert_unit == "layer":
        return (layer,)
    if capabilities.expert_unit == "expert":
        return (layer, index)
    return (layer, index, leaf == "w2")


def _build_unit(checkpoint: Checkpoint, names: tuple[str, ...], capabilities: Capabilities) -> Unit:
    first = names[0]
    role = tensor_role(first, checkpoint.tensors[first].shape)
    layer, expert = _LAYER.match(first), _EXPERT.fullmatch(first)
    return Unit(
        names,
        role,
        int(layer.group(1)) if layer else None,
        expert.group(1) if expert else None,
    )
