from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfmc.calib_free.grid.importance import decode_importance, encode_importance
from lfmc.errors import InputError


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=30).filter(lambda v: max(v) > 1e-30))
def test_letters_keep_importance_within_a_quarter_octave(values: list[float]) -> None:
    importance = torch.tensor(values, dtype=torch.float64) / max(values)
    decoded = decode_importance(encode_importance(torch.tensor(values)), "here").double()
    ratio = decoded / importance.clamp(min=2**-12.5)
    assert float(ratio.log2().abs().max()) <= 0.25 + 1e-3


def test_importances_become_letters() -> None:
    assert encode_importance(torch.tensor([1.0, 0.5, 0.25, 0.0])) == "acez"
    assert encode_importance(torch.zeros(3)) == "aaa"


def test_other_characters_are_refused() -> None:
    with pytest.raises(InputError, match="importance") as caught:
        decode_importance("abC", "model.embed_tokens.weight")
    assert caught.value.where == "model.embed_tokens.weight"
