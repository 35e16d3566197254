"""Run the artifact on this machine, with the same calls as an app."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfmc.errors import InputError, first_line
from lfmc.run.stepper import require_tokens
from lfmc.targets.base import require
from lfmc.targets.onnx.emitter import CONTEXT_KEY, NUM_LOGITS, model_path

ACCURACY_LEVEL_KEY = "accuracy_level"


class OnnxStepper:
    """One conversation, or a batch of `batch` conversations of equal length, on the CPU.

    The buffers of keys and values have the length of the context. The model reads and writes them
    in place: past and present are bound to the same memory.
    """

    def __init__(self, folder: Path, *, exact: bool = False, batch: int = 1) -> None:
        ort = require("onnxruntime", "onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        path = model_path(folder)
        model: str | bytes = str(path)
        if exact:
            model = _with_float_activations(path)
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(path.parent))
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors have no base class
            raise InputError(
                "ONNX Runtime can't load the model",
                where=path,
                got=first_line(error),
                todo="export it again; files of different bundles can't be mixed",
            ) from error
        meta = self._session.get_modelmeta().custom_metadata_map
        self.context = int(json.loads(meta[CONTEXT_KEY]))
        self._ort, self._batch = ort, batch
        self.reset()

    def reset(self) -> None:
        """Start a new conversation: set all states to zeros."""
        self._length = 0
        self._state: dict[str, Any] = {}
        for model_input in self._session.get_inputs():
            if model_input.name.startswith("past"):
                sizes = {"batch": self._batch, "batch_size": self._batch, "past": self.context}
                shape = [sizes.get(d, d) for d in model_input.shape]
                self._state[model_input.name] = self._ort.OrtValue.ortvalue_from_numpy(
                    np.zeros(shape, np.float32)
                )

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append tokens, and return their float32 logits `[T, V]` (`[B, T, V]` for a batch)."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(self._batch, -1)
        self._check(ids)
        total = self._length + ids.shape[1]
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids.numpy())
        binding.bind_cpu_input("attention_mask", np.ones((self._batch, total), np.int64))
        if any(value.name == NUM_LOGITS for value in self._session.get_inputs()):
            binding.bind_cpu_input(NUM_LOGITS, np.zeros((), np.int64))  # of every token
        new_states = {}
        binding.bind_output("logits", "cpu")
        for past, value in self._state.items():
            present = _present(past)
            binding.bind_ortvalue_input(past, value)
            if past.endswith(("key", "value")):
                binding.bind_ortvalue_output(present, value)
            else:
                new_state = self._ort.OrtValue.ortvalue_from_numpy(np.empty_like(value.numpy()))
                binding.bind_ortvalue_output(present, new_state)
                new_states[past] = new_state
        self._session.run_with_iobinding(binding)
        self._state.update(new_states)
        self._length = total
        logits = torch.from_numpy(binding.get_outputs()[0].numpy())
        return logits[0] if self._batch == 1 else logits

    def _check(self, ids: Tensor) -> None:
        vocab = self._session.get_outputs()[0].shape[-1]
        require_tokens(ids, self._length, self.context, vocab)
        if self._batch > 1 and self._length and ids.shape[1] > 1:
            raise InputError(
                "ONNX Runtime continues a batch one token at a time",
                expected="one token per row, or a batch of one",
                got=f"{ids.shape[1]} tokens",
            )


def _present(past: str) -> str:
    """Return the name of the output that continues the state input `past`, in any layout."""
    if past.startswith("past_key_values."):
        return past.replace("past_key_values", "present", 1)
    return past.replace("past", "present", 1)


def experts_are_exact(folder: Path) -> bool:
    """Return whether the model's experts have no accuracy level: then it is 0, as in `exact`."""
    onnx = require("onnx", "onnx")
    model = onnx.load(model_path(folder), load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "QMoE"]
    return not any(a.name == ACCURACY_LEVEL_KEY for node in nodes for a in node.attribute)


def _with_float_activations(path: Path) -> bytes:
    """Return the model with accuracy level 0 in every node, for parity without int8 activations."""
    onnx = require("onnx", "onnx")
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == ACCURACY_LEVEL_KEY:
                attribute.i = 0
    data: bytes = model.SerializeToString()
    return data
