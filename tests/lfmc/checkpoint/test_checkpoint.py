"""Reading checkpoints, and the errors for damaged ones."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfmc.checkpoint.checkpoint import demo_path, open_checkpoint
from lfmc.checkpoint.weight_files import INDEX, SINGLE
from lfmc.errors import InputError
from tests.conftest import TRAINED
from tests.factories import KINDS, reference_model

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny LFM2 that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint("lfm2", vocab_size=48), tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def open_error(path: Path | str) -> str:
    """Return the message of the `InputError` that `open_checkpoint` raises."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, *TRAINED])
def test_names_and_shapes_on_disk(any_checkpoint: Callable[..., Any], name: str) -> None:
    checkpoint = any_checkpoint(name)
    on_disk: dict[str, Tensor] = {}
    for file in checkpoint.path.glob("*.safetensors"):
        on_disk.update(load_file(file))
    for info in checkpoint.tensors.values():
        tensor = on_disk.pop(info.disk_name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint.load(info.name), tensor)
    towers = ("model.vision_tower.", "model.multi_modal_projector.")
    assert all(name.startswith(towers) for name in on_disk)
    assert bool(on_disk) == name.endswith("_vl")


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "lfm3", "lfm2-untied"])
def test_num_params(any_checkpoint: Callable[..., Any], name: str) -> None:
    checkpoint = any_checkpoint(name)
    model = reference_model(checkpoint.path)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("expert_bias"))
    assert checkpoint.num_params == sum(p.numel() for p in model.parameters()) + biases


def test_the_bundled_demo() -> None:
    checkpoint = open_checkpoint()
    assert checkpoint.path == demo_path()
    assert checkpoint.name == "lfm2-moe-8m"
    assert checkpoint.stop_ids == (2, 4)
    assert checkpoint.tokenizer().encode("light").ids


def test_shards_read_like_one_file(folder: Path) -> None:
    single = open_checkpoint(folder)
    values = {name: single.load(name) for name in single.tensors}
    names = sorted(values)
    weight_map = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: values[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    sharded = open_checkpoint(folder)
    assert list(sharded.tensors) == list(single.tensors)
    assert all(torch.equal(sharded.load(n), values[n]) for n in names)


def test_the_fingerprint_depends_on_the_weights_and_the_config(folder: Path) -> None:
    original = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == original
    edit_tensors(folder, lambda tensors: tensors[EMBEDDING][0, 0].add_(1))
    edited = open_checkpoint(folder).fingerprint
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert len({original, edited, open_checkpoint(folder).fingerprint}) == 3


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(2, 2, (2,)), ([2, 7], 9, (2, 7, 9)), (2, [7, 2], (2, 7)), (3, None, (3,))],
)
def test_stop_ids(folder: Path, config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    edit_config(folder, eos_token_id=config)
    text = {} if generation is None else {"eos_token_id": generation}
    (folder / "generation_config.json").write_text(json.dumps(text))
    assert open_checkpoint(folder).stop_ids == expected


def test_stop_ids_of_a_wrong_type_are_an_input_error(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(InputError, match="eos_token_id"):
        _ = open_checkpoint(folder).stop_ids


def test_the_decoder_uses_replaced_weights(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    table = torch.ones(checkpoint.tensors[EMBEDDING].shape)
    decoder = checkpoint.decoder({EMBEDDING: table})
    assert torch.equal(decoder.model.embed_tokens.weight, table)


def test_bfloat16_is_read_and_computed_in_float32(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()})
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.load(EMBEDDING).dtype == torch.bfloat16
    assert checkpoint.decoder().model.embed_tokens.weight.dtype == torch.float32


def test_a_stored_copy_of_a_tied_head_is_ignored(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    assert "lm_head.weight" not in open_checkpoint(folder).tensors


def test_a_stored_head_that_differs_from_the_tied_one_is_refused(folder: Path) -> None:
    # transformers would use the stored head without a warning
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}))
    message = open_error(folder)
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_both_prefixes_of_a_language_tower(folder: Path, prefix: str) -> None:
    expected = list(open_checkpoint(folder).tensors)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "lfm2_vl", "text_config": config})
    )
    save_file(
        {
            **{k.replace("model.", prefix, 1): v for k, v in load_file(folder / SINGLE).items()},
            "vision_tower.patch.weight": torch.zeros(2, dtype=torch.int64),
            "multi_modal_projector.linear_1.weight": torch.ones(2),
        },
        folder / SINGLE,
    )
    assert list(open_checkpoint(folder).tensors) == expected


# Not a checkpoint ------------------------------------------------------------------------------


def test_a_missing_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "no") in open_error(tmp_path / "no")


def test_an_empty_folder(tmp_path: Path) -> None:
    message = open_error(tmp_path)
    assert "config.json" in message
    assert str(tmp_path) in message


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert SINGLE in open_error(folder / SINGLE)


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert SINGLE in open_error(folder)


def test_a_hub_id_offline_and_not_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = open_error("LiquidAI/LFM2-8B-A1B")
    assert "LiquidAI/LFM2-8B-A1B" in message
    assert "HF_HOME" in message


def test_a_hub_id_in_the_local_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("org/tiny")
    assert checkpoint.name == "tiny"  # a folder in the cache is named by its commit
    assert checkpoint.fingerprint == open_checkpoint(folder).fingerprint


def test_an_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="llama")
    message = open_error(folder)
    assert "'llama'" in message
    assert "lfm2_moe" in message
    assert "config.json" in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "\xff", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in open_error(folder)


# Config and tensors disagree -------------------------------------------------------------------


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    assert "model.layers.1.self_attn.q_proj.weight" in open_error(folder)


def test_an_extra_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.9.gain": torch.ones(2)}))
    assert "model.layers.9.gain" in open_error(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    edit_config(folder, vocab_size=49)
    message = open_error(folder)
    assert EMBEDDING in message
    assert "[49, 64]" in message
    assert "[48, 64]" in message


def test_layers_that_the_config_does_not_have(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"])
    assert "model.layers.3." in open_error(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_unsupported_dtypes_are_refused(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING].to(dtype)}))
    message = open_error(folder)
    assert EMBEDDING in message
    assert "BF16" in message


# Damaged files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_on_load(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda t: t[EMBEDDING][3, :2].fill_(value))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(InputError) as caught:
        checkpoint.load(EMBEDDING)
    assert EMBEDDING in str(caught.value)
    assert "2 of 3072" in str(caught.value)


@pytest.mark.parametrize("end", [0, 4, 8, 100, -1])
def test_a_truncated_file(folder: Path, end: int) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:end])
    message = open_error(folder)
    assert SINGLE in message
    assert "truncated or corrupted" in message


def test_a_file_truncated_after_it_was_opened(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="can't be read"):
        checkpoint.load(EMBEDDING)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_header_is_an_input_error(folder: Path, data: st.DataObject) -> None:
    clean = folder.parent / "clean"
    if not clean.is_file():
        shutil.copy(folder / SINGLE, clean)
    content = bytearray(clean.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = st.integers(0, header - 1)
    changes = st.lists(st.tuples(offsets, st.integers(0, 255)), max_size=3)
    for offset, value in data.draw(changes):
        content[offset] = value
    if data.draw(st.booleans()):
        del content[data.draw(offsets) :]
    (folder / SINGLE).write_bytes(content)
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.load(name)
    except InputError as error:  # no other exception is allowed
        message = str(error)
    else:
        message = "fine"
    assert message


class _TouchOnUnpickle:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_and_never_loaded(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    marker = folder / "executed"
    (folder / name).write_bytes(pickle.dumps(_TouchOnUnpickle(marker)))
    message = open_error(folder)
    assert name in message
    assert "pickle" in message
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists()  # unpickling does run code


def test_a_pickle_in_the_index_is_not_loaded(folder: Path) -> None:
    (folder / SINGLE).unlink()
    marker = folder / "executed"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_TouchOnUnpickle(marker)))
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "pytorch_model.bin"}}))
    assert "pytorch_model.bin" in open_error(folder)
    assert not marker.exists()


# The index -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", ".", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors"],
)
def test_an_index_that_points_outside(folder: Path, name: str) -> None:
    shutil.move(folder / SINGLE, folder.parent / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    message = open_error(folder)
    assert "outside" in message
    assert repr(name) in message
    assert INDEX in message


@pytest.mark.parametrize("name", ["", "..", "x\0y", "absent.safetensors"])
def test_an_index_that_names_no_file(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    assert "missing" in open_error(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, []])
def test_an_index_without_files(folder: Path, index: Any) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps(index))
    assert INDEX in open_error(folder)


def test_an_index_beside_a_single_file_is_not_read(folder: Path) -> None:
    expected = open_checkpoint(folder).load(EMBEDDING)
    save_file({EMBEDDING: torch.zeros_like(expected)}, folder / "old.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "old.safetensors"}}))
    assert torch.equal(open_checkpoint(folder).load(EMBEDDING), expected)


# The class and the tokens ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["Lfm2BidirectionalForMaskedLM", "Lfm2ForSequenceClassification", "Lfm2MoeForCausalLM"],
)
def test_other_classes_are_refused(folder: Path, name: str) -> None:
    edit_config(folder, architectures=[name])
    message = open_error(folder)
    assert name in message
    assert "Lfm2ForCausalLM" in message


def test_a_sentence_model_is_refused(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    assert "sentence-transformers" in open_error(folder)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_a_token_outside_the_vocabulary_is_refused(folder: Path, key: str) -> None:
    edit_config(folder, **{key: 10_000_000})
    message = open_error(folder)
    assert key in message
    assert "below 48" in message


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_minus_one_means_no_token(folder: Path, key: str) -> None:
    edit_config(folder, **{key: -1})
    config = open_checkpoint(folder).config
    assert {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id}[key] is None


def test_a_quantization_config_of_float_weights_is_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert open_checkpoint(folder).tensors
    assert "quantization_config" in caplog.text


# The tokenizer ---------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_an_input_error(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        open_checkpoint(folder).tokenizer()


def test_a_broken_tokenizer_is_an_input_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match=r"can't be read"):
        open_checkpoint(folder).tokenizer()


def test_the_demo_path_is_inside_the_package() -> None:
    assert (demo_path() / SINGLE).is_file()
