"""End-to-end training in several processes, one for each GPU, with accelerate."""

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
from lfmc.calib_free.fit.training_loop import SingleProcess, TrainingOptions, TrainingSchedule
from lfmc.calib_free.plan.bit_plan import BitPlan
from lfmc.calib_free.plan.fitted_tensors import FittedFolder, Parts, save_fitted
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import UnsupportedError

POLL_SECONDS = 0.2


class MultiProcess(SingleProcess):
    """One of several training processes; accelerate reads the rank from the environment."""

    def __init__(self, device: str) -> None:
        from accelerate import Accelerator  # type: ignore[import-untyped]

        self._accelerator = Accelerator(cpu=device == "cpu")
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    def average(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes, which have equal batch sizes."""
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        mean = self._accelerator.reduce(flat, "mean")
        for grad, piece in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
            grad.copy_(piece.view_as(grad))

    def broadcast_steps(self, steps: int) -> int:
        from accelerate.utils import broadcast  # type: ignore[import-untyped]

        number = torch.tensor([steps], device=self._accelerator.device)
        return int(broadcast(number))

    def close(self) -> None:
        """End the process group."""
        self._accelerator.end_training()


def require_accelerate() -> None:
    """Raise `UnsupportedError` if accelerate is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "several GPUs need the package 'accelerate'",
            got=error,
            todo="pip install 'lfmc[fit]', or use one GPU",
        ) from error


def distill_multi_process(
    checkpoint: Checkpoint,
    plan: BitPlan,
    texts: Tensor,
    options: TrainingOptions,
    schedule: TrainingSchedule,
    count: int,
) -> dict[str, Parts]:
    """Run `distill` in `count` processes that share each step's texts equally.

    The processes use the GPUs of this machine, or its CPU if `texts` are on the CPU. Raises any
    error of a process.
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
            (checkpoint, folder, texts.device.type, schedule),
            (options.seed, options.deadline, options.state_path),
            messages,
        )
        processes = spawn(_train_process, arguments, nprocs=count, join=False)
        while not processes.join(timeout=POLL_SECONDS):
            _forward_progress(messages, options)
        _forward_progress(messages, options)
        return dict(FittedFolder(folder / "fitted").items())


def _train_process(
    rank: int,
    environment: dict[str, str],
    job: tuple[Checkpoint, Path, str, TrainingSchedule],
    settings: tuple[int, float | None, Path | None],
    messages: Any,
) -> None:
    """Train as process `rank`; the first process writes the result."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    checkpoint, folder, device, schedule = job
    processes = MultiProcess(device)
    rank_device = f"cuda:{rank}" if device == "cuda" else "cpu"
    seed, deadline, state_path = settings
    progress = messages.put if rank == 0 else (lambda message: None)
    texts = load_file(folder / "texts.safetensors", device=rank_device)["texts"]
    options = TrainingOptions(seed, progress, deadline, state_path, processes)
    plan = BitPlan.load(folder / "plan.json")
    fitted = distill(checkpoint, plan, texts, options, schedule)
    if rank == 0:
        (folder / "fitted").mkdir()
        save_fitted(folder / "fitted" / "fitted.safetensors", fitted)
    processes.close()


def _forward_progress(messages: Any, options: TrainingOptions) -> None:
    """Report all messages in the queue."""
    while True:
        try:
            options.progress(messages.get_nowait())
        except queue.Empty:
            return


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
