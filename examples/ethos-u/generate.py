"""Generate text from a bundle of lfmc's Ethos-U target, with TOSA's reference model and tokenizers.

python generate.py BUNDLE "Once upon a time" [COUNT]

This file contains the host's complete part of an inference, in numpy and with integer codes. A
graph returns the codes that a call adds to a state, and the host copies them unchanged. On a
device, an ExecuTorch runner loads `decode.pte` and `prefill.pte`, which were compiled from the
`.tosa` files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tosa_reference_model as tosa
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
        table = "host.safetensors" if has_table else "embedding.safetensors"
        self.table = safe_open(bundle / table, "np")
        self.graphs = {
            count: (bundle / f"{'decode' if count == 1 else 'prefill'}.tosa").read_bytes()
            for count in self.facts["lengths"]
        }
        self.state_names = [
            f"{state['kind']}_{state['layer']}" for state in self.interface["states"]
        ]
        self.reset()

    def codes(self, name: str, value: np.ndarray) -> np.ndarray:
        """Return the signed codes of a graph's input."""
        scale, zero, bits, _ = self.facts["steps"][name]
        codes = np.rint(value / np.float32(scale)) + zero
        middle, dtype = 1 << (bits - 1), {8: np.int8, 16: np.int16}[bits]
        return (np.clip(codes, 0, (1 << bits) - 1) - middle).astype(dtype)

    def reset(self) -> None:
        self.length = 0
        self.states = {}
        for name, state in zip(self.state_names, self.interface["states"], strict=True):
            size = state["shape"]
            if state["kind"] != "conv":  # [1, K, C, D]
                size = [size[1], size[2], size[3]]
            if state["kind"] == "key":
                size = [size[0], size[2], size[1]]
            self.states[name] = self.codes(name, np.zeros(size, np.float32))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Return float32 embeddings `[T, H]`."""
        name = f"host#{self.facts['embedding']}"
        codes, scales = (
            self.table.get_tensor(f"{name}#{part}")[ids] for part in ("codes", "scales")
        )
        return (codes.astype(np.float32) - 128.0) * scales

    def step(self, ids: list[int]) -> np.ndarray:
        """Feed tokens, in calls of the graphs' lengths; return codes of the last logits `[V]`."""
        longest = max(self.graphs)
        for start in range(0, len(ids), longest):
            logits = self._call(np.array(ids[start : start + longest]))
        return logits

    def _call(self, ids: np.ndarray) -> np.ndarray:
        start, count = self.length, len(ids)
        size = min(length for length in self.graphs if length >= count)
        hidden = np.zeros((1, size, self.interface["hidden_size"]), np.float32)
        hidden[0, :count] = self.embed(ids)
        tables = {"hidden": hidden, **self._tables(start, size)}
        inputs = {name: self.codes(name, value) for name, value in tables.items()}
        inputs |= self.states
        order = ["hidden"]
        for kind in self.interface["rotary"]:
            order += [f"cos_{kind}", f"sin_{kind}"]
        order += [*(name for name in tables if name.startswith("mask")), *self.state_names]
        arrays = [np.ascontiguousarray(inputs[name]) for name in order]
        results, status = tosa.run(self.graphs[size], arrays, verbosity="NONE")
        assert status == tosa.GraphStatus.TOSA_VALID
        places = self.facts["places"][str(size)]  # of the outputs among the results
        logits, *updates = (np.array(results[place]) for place in places)
        for name, new in zip(self.state_names, updates, strict=True):
            state, end = self.states[name], start + count
            if name.startswith("key"):
                state[:, :, start:end] = new.reshape(*state.shape[:2], size)[:, :, :count]
            elif name.startswith("value"):
                shape = state.shape[0], size, state.shape[2]
                state[:, start:end] = new.reshape(shape)[:, :count]
            else:  # the last inputs of a filter
                filter_inputs = np.concatenate([state, new.reshape(1, -1, size)[..., :count]], 2)
                self.states[name] = filter_inputs[..., -state.shape[2] :]
        self.length += count
        return logits.reshape(size, -1)[count - 1]

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
        keys = [state for state in self.interface["states"] if state["kind"] == "key"]
        for window in dict.fromkeys(state["window"] or 0 for state in keys):
            visible = key_positions <= positions[:, None]
            if window:
                visible &= key_positions > positions[:, None] - window
            name = f"mask_{window}" if window else "mask"
            tables[name] = np.where(visible, 0.0, MASKED).astype(np.float32)
        return tables


@contextmanager
def redirect_stdout_to_stderr() -> Iterator[None]:
    """Redirect the reference model's output to stderr, so that stdout has only the text."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def generate(bundle: Path, prompt: str, count: int) -> str:
    manifest = json.loads((bundle / "manifest.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    tokens, model = manifest["tokens"], Model(bundle)
    ids = [tokens["bos"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
    new_tokens: list[int] = []
    logits = model.step(ids)
    while len(new_tokens) < count and model.length < manifest["context"]:
        token = int(np.argmax(logits))  # codes have the same order as the logits
        if token in tokens["stop"]:
            break
        new_tokens.append(token)
        logits = model.step([token])
    return tokenizer.decode(new_tokens)


if __name__ == "__main__":
    _, path, text, *rest = sys.argv
    with redirect_stdout_to_stderr():
        answer = generate(Path(path), text, int(rest[0]) if rest else 32)
    print(answer)
