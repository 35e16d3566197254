"""Text from a bundle of lfmc's Ethos-U target, with TOSA's reference model and tokenizers alone.

python generate.py BUNDLE "Once upon a time" [COUNT]

What a host does around the graphs is all here, in numpy and in integers: states are codes, which a
graph's news go into as they come. On a device an ExecuTorch runner loads `decode.pte` and
`prefill.pte` in place of the `.tosa` files that they were compiled from.
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
        with safe_open(bundle / "host.safetensors", "np") as held:
            self.facts: dict[str, Any] = json.loads(held.metadata()["lfmc"])
            alone = list(held.keys())
        self.shape = self.facts["interface"]
        self.table = safe_open(bundle / f"{'host' if alone else 'embedding'}.safetensors", "np")
        self.graphs = {
            count: (bundle / f"{'decode' if count == 1 else 'prefill'}.tosa").read_bytes()
            for count in self.facts["lengths"]
        }
        self.names = [f"{own['kind']}_{own['layer']}" for own in self.shape["states"]]
        self.reset()

    def codes(self, name: str, value: np.ndarray) -> np.ndarray:
        """Codes of a graph's input, with a sign."""
        scale, zero, bits, _ = self.facts["steps"][name]
        codes = np.rint(value / np.float32(scale)) + zero
        low, dtype = 1 << (bits - 1), {8: np.int8, 16: np.int16}[bits]
        return (np.clip(codes, 0, (1 << bits) - 1) - low).astype(dtype)

    def reset(self) -> None:
        self.length = 0
        self.states = {}
        for name, own in zip(self.names, self.shape["states"], strict=True):
            size = own["shape"]
            if own["kind"] != "conv":  # [1, K, C, D]
                size = [size[1], size[2], size[3]]
            if own["kind"] == "key":
                size = [size[0], size[2], size[1]]
            self.states[name] = self.codes(name, np.zeros(size, np.float32))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Float32 `[T, H]`."""
        name = f"host#{self.facts['embedding']}"
        codes, scales = (
            self.table.get_tensor(f"{name}#{part}")[ids] for part in ("codes", "scales")
        )
        return (codes.astype(np.float32) - 128.0) * scales

    def step(self, ids: list[int]) -> np.ndarray:
        """Codes of logits `[V]` behind some tokens, in calls of the lengths that there are."""
        longest = max(self.graphs)
        for at in range(0, len(ids), longest):
            logits = self._call(np.array(ids[at : at + longest]))
        return logits

    def _call(self, ids: np.ndarray) -> np.ndarray:
        start, count = self.length, len(ids)
        size = min(length for length in self.graphs if length >= count)
        hidden = np.zeros((1, size, self.shape["hidden_size"]), np.float32)
        hidden[0, :count] = self.embed(ids)
        tables = {"hidden": hidden, **self._tables(start, size)}
        inputs = {name: self.codes(name, value) for name, value in tables.items()}
        inputs |= self.states
        order = ["hidden"]
        for kind in self.shape["rotary"]:
            order += [f"cos_{kind}", f"sin_{kind}"]
        order += [*(name for name in tables if name.startswith("mask")), *self.names]
        given = [np.ascontiguousarray(inputs[name]) for name in order]
        made, status = tosa.run(self.graphs[size], given, verbosity="NONE")
        assert status == tosa.GraphStatus.TOSA_VALID
        logits, *news = (np.array(made[place]) for place in self.facts["places"][str(size)])
        for name, new in zip(self.names, news, strict=True):
            state, end = self.states[name], start + count
            if name.startswith("key"):
                state[:, :, start:end] = new.reshape(*state.shape[:2], size)[:, :, :count]
            elif name.startswith("value"):
                shape = state.shape[0], size, state.shape[2]
                state[:, start:end] = new.reshape(shape)[:, :count]
            else:  # the last inputs of a filter
                seen = np.concatenate([state, new.reshape(1, -1, size)[..., :count]], 2)
                self.states[name] = seen[..., -state.shape[2] :]
        self.length += count
        return logits.reshape(size, -1)[count - 1]

    def _tables(self, start: int, size: int) -> dict[str, np.ndarray]:
        """Angles of positions, and which slots and tokens each token sees."""
        positions = np.arange(start, start + size, dtype=np.float32)
        tables = {}
        for kind, steps in self.shape["rotary"].items():
            angles = positions[:, None] * np.array(steps, np.float32)
            tables |= {f"cos_{kind}": np.cos(angles), f"sin_{kind}": np.sin(angles)}
        slots = np.arange(self.shape["context"])
        places = np.concatenate([np.where(slots < start, slots, start + size), positions])
        keys = [own for own in self.shape["states"] if own["kind"] == "key"]
        for window in dict.fromkeys(own["window"] or 0 for own in keys):
            seen = places <= positions[:, None]
            if window:
                seen &= places > positions[:, None] - window
            name = f"mask_{window}" if window else "mask"
            tables[name] = np.where(seen, 0.0, MASKED).astype(np.float32)
        return tables


@contextmanager
def text_alone() -> Iterator[None]:
    """What the reference model prints goes to stderr, and the text alone to stdout."""
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
    made: list[int] = []
    logits = model.step(ids)
    while len(made) < count and model.length < manifest["context"]:
        token = int(np.argmax(logits))  # codes are in the order of what they stand for
        if token in tokens["stop"]:
            break
        made.append(token)
        logits = model.step([token])
    return tokenizer.decode(made)


if __name__ == "__main__":
    _, path, text, *rest = sys.argv
    with text_alone():
        answer = generate(Path(path), text, int(rest[0]) if rest else 32)
    print(answer)
