"""Licenses and sampling settings of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.checkpoint.license import read_license
from lfmc.checkpoint.sampling import read_sampling
from lfmc.errors import InputError

CARD = """---
license: other
license_name: lfm1.0
license_link: LICENSE
base_model:
- org/pretrained
tags: [text]
---
# A model
"""


def test_a_model_card_and_license_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    for name in ("LICENSE", "NOTICE", "LICENSE.addendum.txt"):
        (tmp_path / name).write_text("text")
    license = read_license(tmp_path)
    assert (license.identifier, license.name, license.link) == ("other", "lfm1.0", "LICENSE")
    assert license.base_model == "org/pretrained"
    assert license.files == ("LICENSE", "LICENSE.addendum.txt", "NOTICE")
    assert str(license) == "lfm1.0"


@pytest.mark.parametrize("card", [None, "# no metadata", "---\na: [\n---\n", "---\n- a\n---\n"])
def test_a_checkpoint_that_states_no_license(tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert str(read_license(tmp_path)) == "not stated by the checkpoint"
    (tmp_path / "LICENSE").write_text("text")
    assert str(read_license(tmp_path)) == "see LICENSE"


def test_the_license_of_the_bundled_model() -> None:
    assert str(open_checkpoint().license) == "apache-2.0"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"do_sample": False}, {}),
        (
            {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "top_k": None},
            {"temperature": 0.3, "min_p": 0.15},
        ),
        (
            {"do_sample": False, "temperature": 0.3, "repetition_penalty": 1.05},
            {"temperature": 0.0, "repetition_penalty": 1.05},
        ),
        ({"temperature": 0.3, "top_p": 0.9}, {"temperature": 0.3, "top_p": 0.9}),
    ],
)
def test_sampling_settings(tmp_path: Path, config: Any, expected: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_sampling(tmp_path) == expected


@pytest.mark.parametrize("value", ["hot", -1, True, [1]])
def test_a_setting_that_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(InputError, match="temperature"):
        read_sampling(tmp_path)


def test_no_generation_config(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == {}
