"""Load a bundle with ONNX Runtime only and generate text, as an app does.

    python run.py BUNDLE "Once upon a time"
    python run.py BUNDLE --self-test

Requires onnxruntime, tokenizers and numpy; neither torch nor lfmc. The manifest of the bundle has
all facts that this script needs: names and shapes of the states, the start token, every stop token.
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
    """One conversation; `reset` starts a new one."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        model = str(bundle / self.manifest["artifact"][0])
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.reset()

    def reset(self) -> None:
        """Set all states to zeros; keys and values start with length 0."""
        self.length = 0
        sizes = {"batch": 1, "past": 0}
        self.state = {
            state["input"]: np.zeros([sizes.get(d, d) for d in state["shape"]], np.float32)
            for state in self.manifest["states"]
        }

    def step(self, tokens: list[int]) -> np.ndarray:
        """Append tokens, and return their logits [T, V]."""
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
        """Yield up to `count` greedy tokens after a prompt, until a stop token."""
        self.reset()
        logits = self.step(prompt)
        for _ in range(count):
            token = int(logits[-1].argmax())
            if token in self.manifest["tokens"]["stop"]:
                return
            yield token
            logits = self.step([token])


def self_test(model: Model, bundle: Path) -> bool:
    """Return whether the golden prompts produce the same tokens as at export."""
    golden = json.loads((bundle / "golden.json").read_text(encoding="utf-8"))
    for entry in golden:
        model.reset()
        logits, tokens = model.step(entry["prompt"]), []
        for _ in entry["tokens"]:
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) < len(entry["tokens"]):
                logits = model.step(tokens[-1:])
        if tokens != entry["tokens"]:
            print(f"{entry['text']!r}: expected {entry['tokens']}, got {tokens}")
            return False
    print(f"{len(golden)} golden prompts continue as at export")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--self-test", action="store_true")
    arguments = parser.parse_args()
    model = Model(arguments.bundle)
    if arguments.self_test:
        raise SystemExit(0 if self_test(model, arguments.bundle) else 1)
    tokenizer = Tokenizer.from_file(str(arguments.bundle / "tokenizer.json"))
    bos = model.manifest["tokens"]["bos"]
    prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    prompt = prompt if bos is None else [bos, *prompt]
    generated: list[int] = []
    print(arguments.prompt, end="", flush=True)
    for token in model.generate(prompt, arguments.tokens):
        text = tokenizer.decode(generated)
        generated.append(token)
        print(tokenizer.decode(generated)[len(text) :], end="", flush=True)
    print()


if __name__ == "__main__":
    main()
