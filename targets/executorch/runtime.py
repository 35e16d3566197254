"""Running a program by ExecuTorch's own runtime, the way an app does."""

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
    """One conversation on a loaded method; `reset` goes on with the same one, as apps do."""

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
        (self.context,) = self.told("get_max_context_len")
        (self._chunk,) = self.told("get_max_seq_len")
        (self._vocab,) = self.told("get_vocab_size")
        sizes = self._program.metadata("forward").output_tensor_meta(0).sizes()
        self.last_only = sizes[1] < self._chunk
        self.reset()

    def told(self, name: str) -> list[int]:
        """What a method without arguments gives: numbers that runners ask for."""
        with mute():
            method: Any = self._program.load_method(name)
            return [int(value) for value in method.execute([])]

    def reset(self) -> None:
        """Forget the conversation: the next token is at position 0."""
        self._length = 0

    def step(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Float32 logits `[T, V]` of the tokens that come next; `[1, V]` where the program gives
        only those of the last."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)
        require_tokens(ids, self._length, self.context, self._vocab)
        logits = []
        for piece in ids.split(self._chunk):
            start = torch.tensor([self._length])
            with mute():
                found = self._forward.execute([piece.unsqueeze(0), start])
            logits.append(found[0][0].clone())
            self._length += len(piece)
        return logits[-1] if self.last_only else torch.cat(logits)
