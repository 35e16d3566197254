"""Runs independent items of work in parallel, on this machine or on a dask cluster.

Items contain all their inputs (tensors as bytes), so workers only need lfmc: no checkpoint and no
shared disk. Every item runs on one thread, so its result does not depend on the worker or on other
items.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch

from lfmc.errors import InputError, UnsupportedError, first_line
from lfmc.version import __version__

Item = TypeVar("Item")
Result = TypeVar("Result")

SCHEME = "dask://"
CONNECT_SECONDS = 8  # timeout of the connection to a scheduler
NO_WORKERS_SECONDS = 60  # how long to wait while the cluster has no workers
ITEMS_AHEAD = 32  # items created in advance on this machine: bounds memory
ITEMS_AHEAD_PER_THREAD = 4  # items submitted in advance per thread of a cluster


class Workers(Protocol):
    """Applies a module-level function to items; workers import the function."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the order of `items`; only a few items are created in advance."""
        ...


class LocalWorkers:
    """This machine: runs as many items at a time as torch has threads.

    The creation and the computation of items alternate, because creation may use all threads.
    """

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        threads = torch.get_num_threads()
        remaining = iter(items)
        with ThreadPoolExecutor(threads) as pool:
            while batch := list(islice(remaining, ITEMS_AHEAD)):
                torch.set_num_threads(1)
                try:
                    results = list(pool.map(function, batch))
                finally:
                    torch.set_num_threads(threads)
                yield from results


class Cluster:
    """A dask.distributed cluster, reached through a connected client.

    If a worker dies, the scheduler runs its items on another worker.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        limit = ITEMS_AHEAD_PER_THREAD * max(1, sum(self._client.nthreads().values()))
        remaining, futures = iter(items), deque[Any]()
        while True:
            for item in islice(remaining, limit - len(futures)):
                futures.append(self._client.submit(_run_on_one_thread, function, item, pure=False))
            if not futures:
                return
            yield self._result(futures.popleft())

    def _result(self, future: Any) -> Any:
        from distributed.scheduler import KilledWorker

        while True:
            try:
                return future.result(timeout=NO_WORKERS_SECONDS)
            except (TimeoutError, KilledWorker) as error:
                if isinstance(error, TimeoutError) and self._client.nthreads():
                    continue  # a worker is still computing it
                raise UnsupportedError(
                    "the workers of the cluster died or disconnected",
                    where=self._client.scheduler.address,
                    got=first_line(error),
                    todo="look at the workers' logs (out of memory?), or run without --workers",
                ) from error


LOCAL_WORKERS = LocalWorkers()


@contextmanager
def open_workers(address: str | None) -> Iterator[Workers]:
    """Connect to workers at `dask://HOST:PORT`; None is this machine.

    Raise `InputError` for any other address, for a scheduler that can't be reached within about ten
    seconds or has no workers, and for workers with different versions. Raise `UnsupportedError` if
    dask.distributed is not installed.
    """
    if address is None:
        yield LOCAL_WORKERS
        return
    if not address.startswith(SCHEME) or not address.removeprefix(SCHEME):
        raise InputError(
            "the address of the workers can't be read",
            expected=f"{SCHEME}HOST:PORT",
            got=repr(address),
        )
    try:
        from distributed import Client
    except ImportError as error:
        raise UnsupportedError(
            "dask.distributed is not installed",
            where=f"--workers {address}",
            todo="pip install 'lfmc[dask]', here and on the workers",
        ) from error
    try:
        client = Client(
            f"tcp://{address.removeprefix(SCHEME)}",
            timeout=CONNECT_SECONDS,
            set_as_default=False,
        )
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(
            "the scheduler can't be reached",
            where=address,
            got=first_line(error),
            todo="start one with `dask scheduler`, and workers with `dask worker HOST:PORT`",
        ) from error
    with client:
        _require_workers(client, address)
        yield Cluster(client)


def _require_workers(client: Any, address: str) -> None:
    """Raise `InputError` if there are no workers, or if a worker has different versions."""
    try:
        worker_versions = client.run(_versions)
    except Exception as error:  # an import of lfmc on the worker may raise anything
        raise InputError("a worker can't run lfmc", where=address, got=first_line(error)) from error
    if not worker_versions:
        raise InputError(
            "the cluster has no workers", where=address, todo="start one: `dask worker HOST:PORT`"
        )
    for worker, versions in worker_versions.items():
        if versions != _versions():
            raise InputError(
                "a worker has different versions and could compute different results",
                where=worker,
                expected=_versions(),
                got=versions,
            )


def _versions() -> str:
    return f"lfmc {__version__}, torch {torch.__version__}"


def _run_on_one_thread(function: Callable[[Item], Result], item: Item) -> Result:
    """Compute one item on a worker."""
    torch.set_num_threads(1)
    return function(item)
