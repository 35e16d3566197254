"""The `genai` layout, loaded and run by onnxruntime-genai itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from lfmc.errors import UnsupportedError
from lfmc.lowering.request import Options, make_request
from lfmc.run.generate import continue_tokens
from lfmc.targets.base import get_target
from lfmc.targets.onnx.genai import CONFIG_FILE
from tests.targets.lowering import Lowered, mixed

og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


def test_generates_what_lfmc_generates(lowered: Callable[..., Lowered]) -> None:
    build = lowered("lfm2-moe-8m", mixed, layout="genai")
    prompt = [1, *build.checkpoint.tokenizer().encode("Once upon a time").ids]
    expected = list(continue_tokens(build.target.run(build.folder), prompt, 24))
    model = og.Model(str(build.folder))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + 24, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    actual = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    assert actual == expected[: len(actual)]
    assert len(actual) == 24 or actual[-1] in build.checkpoint.stop_ids


def test_the_configuration_lists_every_stop_id(lowered: Callable[..., Lowered]) -> None:
    build = lowered("lfm2-moe-8m", mixed, layout="genai")
    config = json.loads((build.folder / CONFIG_FILE).read_text())
    assert config["model"]["eos_token_id"] == [2, 4]
    assert config["model"]["decoder"]["conv_cache_size"] == 2
    assert config["model"]["context_length"] == build.request.context


def test_lfm3_is_refused_before_any_work(any_checkpoint: Callable[..., object]) -> None:
    checkpoint = any_checkpoint("lfm3")
    options = Options(target_options={"layout": "genai"})
    with pytest.raises(UnsupportedError, match="does not support this model") as error:
        make_request(checkpoint, get_target("onnx"), options)  # type: ignore[arg-type]
    assert error.value.exit_code == 4
