"""The names in `lfmc` itself: functions, however often and in whatever order they are used."""

from __future__ import annotations

import inspect
import pydoc
from pathlib import Path
from random import Random

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
    assert lfmc.verify(bundle_path) == {"files": 11, "golden": 3}


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


def test_help_and_dir_list_the_api() -> None:
    assert set(dir(lfmc)) == set(lfmc.__all__) == {"__version__", *lfmc.api.__all__}
    text = pydoc.render_doc(lfmc, renderer=pydoc.plaintext)
    for name in ("export(", "generate(", "load(", "plan(", "class Bundle", "class InputError"):
        assert name in text, name


def test_every_public_function_and_class_has_a_docstring() -> None:
    for name in lfmc.__all__:
        value = getattr(lfmc, name)
        assert isinstance(value, str) or (inspect.getdoc(value) or "").strip(), name


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match="'bits_per_wieght'"):
        lfmc.export(bits_per_wieght=4.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'targets'"):
        lfmc.plan(targets="onnx")  # type: ignore[call-arg]


def test_export_has_an_argument_for_every_option() -> None:
    from dataclasses import fields

    from lfmc.lowering.request import Options

    arguments = set(inspect.signature(lfmc.export).parameters)
    renamed = {"budget": {"bits_per_weight", "max_size"}}
    for field in fields(Options):
        assert renamed.get(field.name, {field.name}) <= arguments, field.name


def test_reprs_fit_a_line(bundle_path: Path) -> None:
    bundle = lfmc.open_bundle(bundle_path)
    plan = lfmc.BitPlan.load(bundle_path / "plan.json")
    for value in (lfmc.open_checkpoint(), plan):
        assert len(repr(value)) <= 100
    assert "onnx" in repr(bundle)
    assert len(repr(bundle)) <= len(str(bundle_path)) + 60


def test_generate_yields_the_text_of_the_golden_prompts(bundle_path: Path) -> None:
    bundle, model = lfmc.open_bundle(bundle_path), lfmc.load(bundle_path)
    for entry in bundle.read_json("golden.json"):
        count = len(entry["tokens"])
        settings = {"max_tokens": count, "model": model, "raw": True}
        pieces = list(lfmc.generate(bundle, entry["text"], **settings))
        assert "".join(pieces) == entry["continuation"]
        assert len(pieces) > 1


def test_generate_yields_all_text_whatever_its_bytes(bundle_path: Path) -> None:
    from lfmc.bundle.prompt import stream_text

    tokenizer = lfmc.load_tokenizer(bundle_path)
    for text in ("na\u00efve caf\u00e9", "\u65e5\u672c\u8a9e", "a\U0001f600b", " leading", ""):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for end in range(len(ids) + 1):  # a cut may leave half a character
            assert "".join(stream_text(tokenizer, ids[:end])) == tokenizer.decode(ids[:end])
    random = Random(0)
    for _ in range(300):  # bytes in any order, characters that are none among them
        ids = [random.randrange(tokenizer.get_vocab_size()) for _ in range(8)]
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_generate_refuses_at_once(bundle_path: Path) -> None:
    with pytest.raises(InputError, match="max_tokens"):
        lfmc.generate(bundle_path, "x", max_tokens=0)
    with pytest.raises(InputError, match="no such bundle"):
        lfmc.generate(bundle_path / "nowhere", "x")
