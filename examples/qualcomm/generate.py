"""Text from a bundle of lfmc's Qualcomm target, with ONNX Runtime and tokenizers alone.

python generate.py BUNDLE "Once upon a time" [COUNT]

What a host does around the graphs is all here, in numpy: embeddings, angles, masks and states. It
runs the quantized graphs on a CPU. On a device, open them with QNN's execution provider instead, or
open `decode.onnx` and `prefill.onnx`, which are compiled.
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
        with safe_open(bundle / "host.safetensors", "np") as held:
            self.facts: dict[str, Any] = json.loads(held.metadata()["lfmc"])
            alone = list(held.keys())
        self.shape = self.facts["interface"]
        table = "host.safetensors" if alone else "params.safetensors"
        self.table = safe_open(bundle / table, "np")
        self.names = set(self.table.keys())
        names = {1: "decode"}
        self.sessions = {
            count: ort.InferenceSession(bundle / f"{names.get(count, 'prefill')}.qdq.onnx")
            for count in self.facts["lengths"]
        }
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.states = {}
        for state in self.shape["states"]:
            size, name = state["shape"], f"{state['kind']}_{state['layer']}"
            if state["kind"] != "conv":  # [1, K, C, D]
                size = [size[1], size[2], size[3]]
            if state["kind"] == "key":
                size = [size[0], size[2], size[1]]
            self.states[name] = np.zeros(size, np.float32)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Float32 `[T, H]`: rows of a table, or columns of the head that shares it."""
        name, bits = self.facts["embedding"], self.facts["embedding_bits"]
        held, middle = self.table, 1 << (bits - 1) if bits else 0
        if not bits:
            rows = f"host#{name}" in self.names
            value = held.get_tensor(f"host#{name}" if rows else name)
            return (value[ids] if rows else value[:, ids].T).astype(np.float32)
        shifts = np.arange(0, 8, bits)
        if f"host#{name}#codes" in self.names:
            packed, scales = (held.get_tensor(f"host#{name}#{p}")[ids] for p in ("codes", "scales"))
            codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
            return ((codes.reshape(len(ids), -1) - float(middle)) * scales).astype(np.float32)
        full = next(key for key in self.names if key.startswith(f"{name}#{bits}:"))
        columns, rows = map(int, full.split(":")[1:])
        each = 8 // bits
        lanes = (
            held.get_tensor(full).reshape(columns, rows // each)[:, ids // each].astype(np.int32)
        )
        codes = (((lanes >> (bits * (ids % each))) & ((1 << bits) - 1)) ^ middle) - middle
        return (codes * held.get_tensor(f"{name}#scales")[ids]).T.astype(np.float32)

    def step(self, ids: list[int]) -> np.ndarray:
        """Logits `[V]` behind some tokens, in calls of the lengths that there are graphs for."""
        longest = max(self.sessions)
        for at in range(0, len(ids), longest):
            logits = self._call(np.array(ids[at : at + longest]))
        return logits

    def _call(self, ids: np.ndarray) -> np.ndarray:
        start, count = self.length, len(ids)
        size = min(length for length in self.sessions if length >= count)
        inputs = {**self.states, **self._tables(start, size)}
        inputs["hidden"] = np.zeros((1, size, self.shape["hidden_size"]), np.float32)
        inputs["hidden"][0, :count] = self.embed(ids)
        session = self.sessions[size]
        names = [own.name for own in session.get_outputs()]
        wanted = {own.name: inputs[own.name] for own in session.get_inputs()}
        made = dict(zip(names, session.run(names, wanted), strict=True))
        for name, state in self.states.items():
            new, end = made[f"{name}_new"], start + count
            if name.startswith("key"):
                state[:, :, start:end] = new[:, :, :count]
            elif name.startswith("value"):
                state[:, start:end] = new[:, :count]
            else:  # the last inputs of a filter
                seen = np.concatenate([state, new[..., :count]], 2)
                self.states[name] = seen[..., -state.shape[2] :]
        self.length += count
        return made["logits"][0, count - 1]

    def _tables(self, start: int, size: int) -> dict[str, np.ndarray]:
        """Angles of positions, and which slots and tokens each token sees."""
        positions = np.arange(start, start + size, dtype=np.float32)
        tables = {}
        for kind, steps in self.shape["rotary"].items():
            angles = positions[:, None] * np.array(steps, np.float32)
            tables |= {f"cos_{kind}": np.cos(angles), f"sin_{kind}": np.sin(angles)}
        slots = np.arange(self.shape["context"])
        places = np.concatenate([np.where(slots < start, slots, start + size), positions])
        windows = {state["window"] or 0 for state in self.shape["states"]}
        for window in windows:
            seen = places <= positions[:, None]
            if window:
                seen &= places > positions[:, None] - window
            name = f"mask_{window}" if window else "mask"
            tables[name] = np.where(seen, 0.0, MASKED).astype(np.float32)
        return tables


def generate(bundle: Path, prompt: str, count: int) -> str:
    manifest = json.loads((bundle / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokens, model = manifest["tokens"], Model(bundle)
    ids = [tokens["bos"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
    made: list[int] = []
    logits = model.step(ids)
    while len(made) < count and model.length < manifest["context"]:
        token = int(np.argmax(logits))
        if token in tokens["stop"]:
            break
        made.append(token)
        logits = model.step([token])
    return tokenizer.decode(made)


if __name__ == "__main__":
    _, path, text, *rest = sys.argv
    print(generate(Path(path), text, int(rest[0]) if rest else 32))
