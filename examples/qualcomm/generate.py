"""Generate text from a bundle of lfmc's Qualcomm target, with only ONNX Runtime and tokenizers.

python generate.py BUNDLE "Once upon a time" [COUNT]

This file contains the host's complete part of an inference, in numpy: embeddings, angles, masks and
states. It runs the quantized graphs on a CPU. On a device, open them with QNN's execution provider
instead, or open the compiled graphs `decode.onnx` and `prefill.onnx`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from safetensors import safe_open
from tokenizers import Tokenizer

MASKED = -64.0


class Model:
    """One conversation."""

    def __init__(self, bundle: Path) -> None:
        with safe_open(bundle / "host.safetensors", "np") as host_file:
            self.facts: dict[str, Any] = json.loads(host_file.metadata()["lfmc"])
            has_table = bool(list(host_file.keys()))
        self.interface = self.facts["interface"]
        table = "host.safetensors" if has_table else "params.safetensors"
        self.table = safe_open(bundle / table, "np")
        self.tensor_names = set(self.table.keys())
        graph_names = {1: "decode"}
        self.sessions = {
            count: ort.InferenceSession(bundle / f"{graph_names.get(count, 'prefill')}.qdq.onnx")
            for count in self.facts["lengths"]
        }
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.states = {}
        for state in self.interface["states"]:
            size, name = state["shape"], f"{state['kind']}_{state['layer']}"
            if state["kind"] != "conv":  # [1, K, C, D]
                size = [size[1], size[2], size[3]]
            if state["kind"] == "key":
                size = [size[0], size[2], size[1]]
            self.states[name] = np.zeros(size, np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 `[T, H]`, from rows of a table or columns of a head that shares it."""
        name, bits = self.facts["embedding"], self.facts["embedding_bits"]
        table, middle = self.table, 1 << (bits - 1) if bits else 0
        if not bits:
            rows = f"host#{name}" in self.tensor_names
            value = table.get_tensor(f"host#{name}" if rows else name)
            return (value[ids] if rows else value[:, ids].T).astype(np.float32)
        shifts = np.arange(0, 8, bits)
        if f"host#{name}#codes" in self.tensor_names:
            packed, scales = (
                table.get_tensor(f"host#{name}#{part}")[ids] for part in ("codes", "scales")
            )
            codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
            return ((codes.reshape(len(ids), -1) - float(middle)) * scales).astype(np.float32)
        codes_name = next(key for key in self.tensor_names if key.startswith(f"{name}#{bits}:"))
        columns, rows = map(int, codes_name.split(":")[1:])
        codes_per_byte = 8 // bits
        lanes = table.get_tensor(codes_name).reshape(columns, rows // codes_per_byte)
        lanes = lanes[:, ids // codes_per_byte].astype(np.int32)
        codes = (lanes >> (bits * (ids % codes_per_byte))) & ((1 << bits) - 1)
        signed = (codes ^ middle) - middle
        return (signed * table.get_tensor(f"{name}#scales")[ids]).T.astype(np.float32)

    def step(self, ids: list[int]) -> np.ndarray:
        """Feed tokens, in calls of the graphs' lengths; return the last logits `[V]`."""
        longest = max(self.sessions)
        for start in range(0, len(ids), longest):
            logits = self._call(np.array(ids[start : start + longest]))
        return logits

    def _call(self, ids: np.ndarray) -> np.ndarray:
        start, count = self.length, len(ids)
        size = min(length for length in self.sessions if length >= count)
        inputs = {**self.states, **self._tables(start, size)}
        inputs["hidden"] = np.zeros((1, size, self.interface["hidden_size"]), np.float32)
        inputs["hidden"][0, :count] = self.embed(ids)
        session = self.sessions[size]
        output_names = [output.name for output in session.get_outputs()]
        arguments = {value.name: inputs[value.name] for value in session.get_inputs()}
        outputs = dict(zip(output_names, session.run(output_names, arguments), strict=True))
        for name, state in self.states.items():
            new, end = outputs[f"{name}_new"], start + count
            if name.startswith("key"):
                state[:, :, start:end] = new[:, :, :count]
            elif name.startswith("value"):
                state[:, start:end] = new[:, :count]
            else:  # the last inputs of a filter
                filter_inputs = np.concatenate([state, new[..., :count]], 2)
                self.states[name] = filter_inputs[..., -state.shape[2] :]
        self.length += count
        return outputs["logits"][0, count - 1]

    def _tables(self, start: int, size: int) -> dict[str, np.ndarray]:
        """Return the cosines and sines of positions, and the attention masks."""
        positions = np.arange(start, start + size, dtype=np.float32)
        tables = {}
        for kind, frequencies in self.interface["rotary"].items():
            angles = positions[:, None] * np.array(frequencies, np.float32)
            tables |= {f"cos_{kind}": np.cos(angles), f"sin_{kind}": np.sin(angles)}
        slots = np.arange(self.interface["context"])
        # Slots that are not written yet get a position after all tokens.
        key_positions = np.concatenate([np.where(slots < start, slots, start + size), positions])
        windows = {state["window"] or 0 for state in self.interface["states"]}
        for window in windows:
            visible = key_positions <= positions[:, None]
            if window:
                visible &= key_positions > positions[:, None] - window
            name = f"mask_{window}" if window else "mask"
            tables[name] = np.where(visible, 0.0, MASKED).astype(np.float32)
        return tables


def generate(bundle: Path, prompt: str, count: int) -> str:
    manifest = json.loads((bundle / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokens, model = manifest["tokens"], Model(bundle)
    ids = [tokens["bos"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
    new_tokens: list[int] = []
    logits = model.step(ids)
    while len(new_tokens) < count and model.length < manifest["context"]:
        token = int(np.argmax(logits))
        if token in tokens["stop"]:
            break
        new_tokens.append(token)
        logits = model.step([token])
    return tokenizer.decode(new_tokens)


if __name__ == "__main__":
    _, path, text, *rest = sys.argv
    print(generate(Path(path), text, int(rest[0]) if rest else 32))
