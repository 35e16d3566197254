"""Load a bundle with ONNX Runtime alone and generate: what an app does, in one file.

    python run.py BUNDLE "Once upon a time"
    python run.py BUNDLE --self-test

Needs onnxruntime, tokenizers and numpy; neither torch nor lfmc. Everything it has to know is in the
bundle's manifest: names and shapes of the states, the start token, every stop token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Model:
    """One conversation; `reset` starts another."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        model = str(bundle / self.manifest["artifact"][0])
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.reset()

    def reset(self) -> None:
        """All states are zeros; keys and values begin with no positions at all."""
        self.length = 0
        sizes = {"batch": 1, "past": 0}
        self.state = {
            state["input"]: np.zeros([sizes.get(d, d) for d in state["shape"]], np.float32)
            for state in self.manifest["states"]
        }

    def step(self, tokens: list[int]) -> np.ndarray:
        """Logits [T, V] of the tokens that come next."""
        self.length += len(tokens)
        if self.length > self.manifest["context"]:
            raise ValueError(f"longer than the context of {self.manifest['context']} tokens")
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            **self.state,
        }
        names = [state["output"] for state in self.manifest["states"]]
        logits, *states = self.session.run(["logits", *names], feeds)
        self.state = dict(zip(self.state, states, strict=True))
        return logits[0]

    def generate(self, prompt: list[int], count: int) -> Iterator[int]:
        """Greedy tokens after a prompt, up to a stop token."""
        self.reset()
        logits = self.step(prompt)
        for _ in range(count):
            token = int(logits[-1].argmax())
            if token in self.manifest["tokens"]["stop"]:
                return
            yield token
            logits = self.step([token])


def self_test(model: Model, bundle: Path) -> bool:
    """Whether the golden prompts continue as they did when the bundle was exported."""
    golden = json.loads((bundle / "golden.json").read_text(encoding="utf-8"))
    for entry in golden:
        model.reset()
        logits, found = model.step(entry["prompt"]), []
        for _ in entry["tokens"]:
            found.append(int(logits[-1].argmax()))
            if len(found) < len(entry["tokens"]):
                logits = model.step(found[-1:])
        if found != entry["tokens"]:
            print(f"{entry['text']!r}: expected {entry['tokens']}, got {found}")
            return False
    print(f"{len(golden)} golden prompts continue as they should")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--self-test", action="store_true")
    asked = parser.parse_args()
    model = Model(asked.bundle)
    if asked.self_test:
        raise SystemExit(0 if self_test(model, asked.bundle) else 1)
    tokenizer = Tokenizer.from_file(str(asked.bundle / "tokenizer.json"))
    bos = model.manifest["tokens"]["bos"]
    prompt = tokenizer.encode(asked.prompt, add_special_tokens=False).ids
    prompt = prompt if bos is None else [bos, *prompt]
    new: list[int] = []
    print(asked.prompt, end="", flush=True)
    for token in model.generate(prompt, asked.tokens):
        before = tokenizer.decode(new)
        new.append(token)
        print(tokenizer.decode(new)[len(before) :], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
