"""An export to a bundle, which lfmc and ExecuTorch's own runner load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lfmc
from lfmc.bundle.bundle import Bundle
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError
from lfmc.exporter.reverify import reverify
from lfmc.machine.progress import Silent
from lfmc.run.generate import continue_tokens
from lfmc.targets.base import get_target


@pytest.fixture(scope="module")
def source(tiny_moe: Checkpoint) -> Checkpoint:
    return tiny_moe


def test_the_manifest_contains_what_an_app_needs(bundle: Bundle, source: Checkpoint) -> None:
    manifest = bundle.manifest
    assert manifest["backend"] == "xnnpack"
    assert manifest["chunk"] == 32
    assert manifest["artifact"] == ["model.pte"]
    assert manifest["delegates"] > 0
    assert manifest["operators_outside"]["llama::custom_sdpa.out"] == 2
    kinds = [state["name"].split("_")[0] for state in manifest["states"]]
    assert (kinds.count("conv"), kinds.count("key"), kinds.count("value")) == (2, 2, 2)
    assert {state["reset"] for state in manifest["states"]} == {"start_pos_0"}


def test_the_program_has_the_methods_of_language_models(bundle: Bundle, source: Checkpoint) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(bundle.path / "model.pte")
    config = source.config

    def call(name: str) -> object:
        method = program.load_method(name)
        assert method is not None
        results = method.execute([])
        return results if len(results) > 1 else results[0]

    assert call("get_max_context_len") == 128
    assert call("get_max_seq_len") == 32
    assert call("get_vocab_size") == config.vocab_size
    assert call("get_n_layers") == config.num_layers
    assert call("get_bos_id") == config.bos_id
    assert call("get_eos_ids") == list(source.stop_ids)
    assert call("use_kv_cache") is True


def test_the_bundle_loads_and_verifies(bundle: Bundle, source: Checkpoint) -> None:
    model = lfmc.load(bundle.path)
    first = model.step(list(range(3, 80)))  # three calls
    assert first.shape == (77, source.config.vocab_size)
    model.reset()
    assert torch.equal(model.step(list(range(3, 80))), first)
    verification = reverify(bundle, source, Silent(), "fast")
    assert verification["golden"] > 0


def test_executorchs_own_runner_generates_the_same_text(bundle: Bundle, source: Checkpoint) -> None:
    from executorch.extension.llm.runner import _llm_runner

    tokenizer = source.tokenizer()
    assert source.config.bos_id is not None
    # The text has to contain the start token: this runner ignores `num_bos`.
    prompt = tokenizer.id_to_token(source.config.bos_id) + "Once upon a time"
    runner = _llm_runner.TextLLMRunner(
        str(bundle.path / "model.pte"), str(bundle.path / "tokenizer.json")
    )
    config = _llm_runner.GenerationConfig(echo=False, max_new_tokens=12, temperature=0.0)
    pieces: list[str] = []
    runner.generate(prompt, config, pieces.append, None)
    stepper = get_target("executorch").run(bundle.path)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    assert ids[0] == source.config.bos_id
    generated = list(continue_tokens(stepper, ids, 12, source.stop_ids))
    assert "".join(pieces) == tokenizer.decode(generated)
    assert len(generated) == 12


def test_a_folder_without_its_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ExecuTorch program"):
        get_target("executorch").run(tmp_path)
