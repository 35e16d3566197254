"""A stepper that runs a program in ExecuTorch's own runtime, as an app does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmc.errors import InputError, first_line
from lfmc.run.stepper import require_tokens
from lfmc.targets.executorch.library import load_operators, mute
from lfmc.targets.executorch.stored import MODEL


class ExecutorchStepper:
    """One conversation on a loaded method; `reset` reuses the method, as apps do."""

    def __init__(self, folder: Path) -> None:
        load_operators()
        from executorch.runtime import Runtime, Verification

        path = folder / MODEL
        if not path.is_file():
            raise InputError("there is no ExecuTorch program", where=path)
        try:
            with mute():
                runtime = Runtime.get()
                self._program = runtime.load_program(path, verification=Verification.Minimal)
                self._forward = self._program.load_method("forward")
        except (RuntimeError, OSError) as error:
            raise InputError(
                "the runtime can't load the program",
                where=path,
                got=first_line(error),
                todo="it may be damaged, or of another version of ExecuTorch",
            ) from error
        (self.context,) = self.read_integers("get_max_context_len")
        (self._chunk,) = self.read_integers("get_max_seq_len")
        (self._vocab_size,) = self.read_integers("get_vocab_size")
        sizes = self._program.metadata("forward").output_tensor_meta(0).sizes()
        self.last_only = sizes[1] < self._chunk
        self.reset()

    def read_integers(self, name: str) -> list[int]:
        """Return the integers of a method without arguments, which ExecuTorch's runners call."""
        with mute():
            method: Any = self._program.load_method(name)
            return [int(value) for value in method.execute([])]

    def reset(self) -> None:
        """Start a new conversation: the next token is at position 0."""
        self._length = 0

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Append tokens and return float32 logits `[T, V]`.

        The logits are `[1, V]` if the program returns only those of the last token.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab_size)
        logits = []
        for chunk in ids.split(self._chunk):
            start = torch.tensor([self._length])
            with mute():
                outputs = self._forward.execute([chunk.unsqueeze(0), start])
            logits.append(outputs[0][0].clone())
            self._length += len(chunk)
        return logits[-1] if self.last_only else torch.cat(logits)
