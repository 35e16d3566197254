"""Rotary embeddings of every kind, compared with those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.lfm2.modeling_lfm2 import Lfm2RotaryEmbedding
from transformers.models.lfm3.modeling_lfm3 import Lfm3RotaryEmbedding

from lfmc.errors import InputError
from lfmc.model import read_config
from lfmc.model.rope import inverse_frequencies
from tests.lfmc.model.test_read_config import raw_config

SCALED: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default-with-a-factor": {"rope_type": "default", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-without-a-length": {"rope_type": "yarn", "factor": 8.0},
    "yarn-old-key": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-all-settings": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 20,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("name", SCALED)
def test_frequencies_and_gain_equal_those_of_transformers(name: str, theta: float) -> None:
    def raw(model_type: str) -> dict[str, Any]:
        settings = {**SCALED[name], "rope_theta": theta}
        kinds = ("full_attention", "sliding_attention")
        parameters = {kind: {**settings} for kind in kinds} if model_type == "lfm3" else settings
        return raw_config(model_type, rope_parameters=parameters)

    dense = Lfm2RotaryEmbedding(transformers.Lfm2Config(**raw("lfm2")))
    config = read_config(raw("lfm2"))
    torch.testing.assert_close(
        inverse_frequencies(config, "full_attention"), dense.inv_freq, rtol=1e-6, atol=0
    )
    assert config.rope["full_attention"].gain == pytest.approx(dense.attention_scaling)

    nested = Lfm3RotaryEmbedding(transformers.Lfm3Config(**raw("lfm3")))
    config = read_config(raw("lfm3"))
    for kind in config.rope:
        expected = getattr(nested, f"{kind}_inv_freq")
        torch.testing.assert_close(inverse_frequencies(config, kind), expected, rtol=1e-6, atol=0)
        expected_gain = getattr(nested, f"{kind}_attention_scaling")
        assert config.rope[kind].gain == pytest.approx(expected_gain)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", 3, ["x"]])
@pytest.mark.parametrize("model_type", ["lfm2", "lfm3"])
def test_other_kinds_are_refused(model_type: str, rope_type: Any) -> None:
    settings = {"rope_type": rope_type, "rope_theta": 1e6, "factor": 2.0}
    nested = {"full_attention": settings, "sliding_attention": settings}
    parameters = nested if model_type == "lfm3" else settings
    with pytest.raises(InputError, match="full_attention") as caught:
        read_config(raw_config(model_type, rope_parameters=parameters))
    assert str(rope_type) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": 0.0}, "factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor",
        ),
    ],
)
def test_missing_and_bad_settings_are_named(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=key):
        read_config(raw_config("lfm2", rope_parameters=settings))
