"""The names in `lfmc` itself: functions, however often and in whatever order they are used."""

from __future__ import annotations

from pathlib import Path

import pytest

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.errors import InputError


def test_names_stay_functions_after_use(bundle_path: Path) -> None:
    import lfmc.exporter.export
    import lfmc.exporter.reverify
    import lfmc.verification.rungs

    for name in lfmc.__all__:
        value = getattr(lfmc, name)
        assert isinstance(value, str) or callable(value), name
    with pytest.raises(InputError):
        lfmc.export("nowhere")
    with pytest.raises(InputError):
        lfmc.export("nowhere")


def test_a_plan_takes_the_knobs_of_alphaq() -> None:
    plans = [
        lfmc.plan(bits="alphaq", bits_per_weight=4.4, alphaq=knobs)
        for knobs in (None, lfmc.AlphaQOptions(), lfmc.AlphaQOptions(gamma=10.0, bits=(2, 8)))
    ]
    assert plans[0] == plans[1] != plans[2]


def test_verify_returns_what_it_found(bundle_path: Path) -> None:
    assert lfmc.verify(bundle_path) == {"files": 9, "golden": 3}


def test_load_refuses_a_manifest_that_disagrees(bundle_path: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bundle_path, tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"context": 200', '"context": 201'))
    with pytest.raises(InputError, match="disagree about the context"):
        lfmc.load(tmp_path / "b")


def test_no_submodule_hides_a_function() -> None:
    package = Path(lfmc.__file__).parent
    names = {path.stem for path in package.iterdir()}
    assert not names & set(lfmc.__all__)
    assert Bundle.__module__ == "lfmc.bundle.bundle"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        lfmc.frobnicate  # noqa: B018
