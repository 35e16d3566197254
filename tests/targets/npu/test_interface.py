"""What a host brings to a call and keeps of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.model.rope import inverse_frequencies, rotation
from lfmc.targets.npu.interface import MASKED, Interface, carried


@pytest.fixture
def interface(any_checkpoint: Callable[[str], Checkpoint]) -> Interface:
    """Of lfm3: full and sliding attention, of 8 positions."""
    return Interface.of(any_checkpoint("lfm3").config, 32, 4)


def test_json_tells_all_of_it(interface: Interface) -> None:
    assert Interface.from_dict(json.loads(json.dumps(asdict(interface)))) == interface


def test_angles_are_the_models(
    interface: Interface, any_checkpoint: Callable[[str], Checkpoint]
) -> None:
    config, tables = any_checkpoint("lfm3").config, interface.tables(11)
    for kind in interface.rotary:
        cos, sin = rotation(torch.arange(11, 15), inverse_frequencies(config, kind))
        half = config.head_dim // 2
        assert torch.equal(tables[f"cos_{kind}"], cos[:, :half])
        assert torch.equal(tables[f"sin_{kind}"], sin[:, :half])


def test_masks(interface: Interface) -> None:
    """Slots that were written and tokens of the call, up to oneself; a window sees 8 positions."""
    tables = interface.tables(11)
    for name, window in (("mask", 99), ("mask_8", 8)):
        seen = tables[name] == 0
        assert torch.equal(tables[name][~seen], torch.full_like(tables[name][~seen], MASKED))
        for token in range(4):
            position = 11 + token
            places = [slot for slot in range(32) if seen[token, slot]]
            places += [11 + new for new in range(4) if seen[token, 32 + new]]
            assert places == list(range(max(0, position - window + 1), position + 1))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_states_behind_a_call(interface: Interface, count: int) -> None:
    """Tokens that fill a call up leave no trace."""
    for spec in interface.states:
        state = torch.rand(interface.state_shape(spec, 32))
        new = torch.rand(interface.new_shape(spec))
        before = state.clone()
        after = carried(spec, state, new, 11, count)
        if spec.kind == "conv":
            back = before.shape[2]
            expected = torch.cat([before, new[..., :count]], 2)[..., -back:]
        else:
            dim = 1 if spec.kind == "value" else 2
            expected = before
            expected.narrow(dim, 11, count).copy_(new.narrow(dim, 0, count))
        assert torch.equal(after, expected)
