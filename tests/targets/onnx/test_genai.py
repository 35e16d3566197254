"""The `genai` layout, loaded and run by onnxruntime-genai itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lfmc.checkpoint.checkpoint import open_checkpoint
from lfmc.errors import UnsupportedError
from lfmc.lowering.request import Options, make_request
from lfmc.run.generate import continue_tokens
from lfmc.targets.base import get_target
from lfmc.targets.onnx.genai import CONFIG_FILE
from tests.targets.lowering import Lowered, lower, mixed

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


def test_the_configuration_has_the_sampling_of_the_checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint("lfm2"), tmp_path / "model"))
    sampling = {"temperature": 0.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.05}
    (model / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "min_p": 0.15, **sampling})
    )
    build = lower(open_checkpoint(model), mixed, tmp_path, options={"layout": "genai"})
    search = json.loads((build.folder / CONFIG_FILE).read_text())["search"]
    assert {key: search[key] for key in ("do_sample", *sampling)} == {"do_sample": True, **sampling}
    assert "min_p" not in search  # genai refuses it
    loaded = og.Model(str(build.folder))
    settings = og.GeneratorParams(loaded)
    settings.set_search_options(max_length=20, random_seed=1)
    generator = og.Generator(loaded, settings)
    generator.append_tokens([1, 5, 9])
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 4
