"""Learning end to end in several processes, one a GPU, through accelerate."""

from __future__ import annotations

import os
import queue
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from lfmc.calib_free.fit.distill import distill
from lfmc.calib_free.fit.training_loop import Alone, Course, Terms
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import FittedFolder, Parts, save_fitted
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.errors import UnsupportedError

POLL_SECONDS = 0.2


class Together(Alone):
    """This process among those of one training; accelerate finds the others by the environment."""

    def __init__(self, device: str) -> None:
        from accelerate import Accelerator  # type: ignore[import-untyped]

        self._accelerator = Accelerator(cpu=device == "cpu")
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Every gradient becomes the mean over the processes, which saw as many texts each."""
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        mean = self._accelerator.reduce(flat, "mean")
        for grad, piece in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(piece.view_as(grad))

    def agree(self, steps: int) -> int:
        from accelerate.utils import broadcast  # type: ignore[import-untyped]

        number = torch.tensor([steps], device=self._accelerator.device)
        return int(broadcast(number))

    def part(self) -> None:
        """Leave the others in order."""
        self._accelerator.end_training()


def require_accelerate() -> None:
    """Raise `UnsupportedError`, naming the extra, where accelerate is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "several GPUs need the package 'accelerate'",
            got=error,
            todo="pip install 'lfmc[fit]', or use one GPU",
        ) from error


def distill_together(
    checkpoint: Checkpoint, plan: BitPlan, texts: Tensor, terms: Terms, course: Course, count: int
) -> dict[str, Parts]:
    """What `distill` gives, by `count` processes that share each step's texts equally.

    They are on the GPUs of this machine, or, where `texts` are there, on its CPU. Raises what the
    processes raise.
    """
    require_accelerate()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan.save(folder / "plan.json")
        save_file({"texts": texts.cpu().contiguous()}, folder / "texts.safetensors")
        context = torch.multiprocessing.get_context("spawn")
        messages: Any = context.Queue()
        arguments = (
            {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()},
            (str(checkpoint.path), folder, texts.device.type, course),
            (terms.seed, terms.ends, terms.resume),
            messages,
        )
        running = spawn(_work, arguments, nprocs=count, join=False)
        while not running.join(timeout=POLL_SECONDS):
            _tell(messages, terms)
        _tell(messages, terms)
        return dict(FittedFolder(folder / "made").items())


def _work(
    rank: int,
    environment: dict[str, str],
    what: tuple[str, Path, str, Course],
    how: tuple[int, float | None, Path | None],
    messages: Any,
) -> None:
    """One process."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    path, folder, device, course = what
    crew = Together(device)
    own = f"cuda:{rank}" if device == "cuda" else "cpu"
    seed, ends, resume = how
    tell = messages.put if rank == 0 else (lambda message: None)
    texts = load_file(folder / "texts.safetensors", device=own)["texts"]
    terms = Terms(seed, tell, ends, resume, crew)
    made = distill(open_checkpoint(path), BitPlan.load(folder / "plan.json"), texts, terms, course)
    if rank == 0:
        (folder / "made").mkdir()
        save_fitted(folder / "made" / "fitted.safetensors", made)
    crew.part()


def _tell(messages: Any, terms: Terms) -> None:
    while True:
        try:
            terms.progress(messages.get_nowait())
        except queue.Empty:
            return


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
