"""The tables that a host passes to a call, and its update of the states."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model.rope import inverse_frequencies, rotation
from lfmc.targets.npu.interface import MASKED, Interface, update_state


@pytest.fixture
def interface(any_checkpoint: Callable[[str], Checkpoint]) -> Interface:
    """Interface of lfm3: full attention, and sliding attention of 8 positions."""
    return Interface.from_config(any_checkpoint("lfm3").config, 32, 4)


def test_json_preserves_all_fields(interface: Interface) -> None:
    assert Interface.from_dict(json.loads(json.dumps(asdict(interface)))) == interface


def test_angles_are_those_of_the_model(
    interface: Interface, any_checkpoint: Callable[[str], Checkpoint]
) -> None:
    config, tables = any_checkpoint("lfm3").config, interface.tables(11)
    for kind in interface.rotary:
        cos, sin = rotation(torch.arange(11, 15), inverse_frequencies(config, kind))
        half = config.head_dim // 2
        assert torch.equal(tables[f"cos_{kind}"], cos[:, :half])
        assert torch.equal(tables[f"sin_{kind}"], sin[:, :half])


def test_masks_are_causal(interface: Interface) -> None:
    """A token sees the written slots and the tokens of the call up to itself, or 8 positions."""
    tables = interface.tables(11)
    for name, window in (("mask", 99), ("mask_8", 8)):
        visible = tables[name] == 0
        masked = tables[name][~visible]
        assert torch.equal(masked, torch.full_like(masked, MASKED))
        for token in range(4):
            position = 11 + token
            positions = [slot for slot in range(32) if visible[token, slot]]
            positions += [11 + new for new in range(4) if visible[token, 32 + new]]
            assert positions == list(range(max(0, position - window + 1), position + 1))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_padding_does_not_change_states(interface: Interface, count: int) -> None:
    for spec in interface.states:
        state = torch.rand(interface.state_shape(spec, 32))
        new = torch.rand(interface.new_shape(spec))
        before = state.clone()
        after = update_state(spec, state, new, 11, count)
        if spec.kind == "conv":
            length = before.shape[2]
            expected = torch.cat([before, new[..., :count]], 2)[..., -length:]
        else:
            dim = 1 if spec.kind == "value" else 2
            expected = before
            expected.narrow(dim, 11, count).copy_(new.narrow(dim, 0, count))
        assert torch.equal(after, expected)
