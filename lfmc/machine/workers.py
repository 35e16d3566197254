"""Where work that falls apart into items is done: on this machine, or on a dask cluster.

Items carry all that is needed (tensors as bytes), so workers need lfmc and nothing else: no
checkpoint, no shared disk. Every item is computed on one thread, so results are the same wherever
and beside whatever it runs.
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
CONNECT_SECONDS = 8  # for a scheduler to answer
ALONE_SECONDS = 60  # that work waits for while the cluster has no workers
AHEAD = 32  # items made before their turn on this machine: bounds memory
AHEAD_A_THREAD = 4  # the same, for each thread of a cluster


class Workers(Protocol):
    """Applies a function to items; `function` is a module's, so that workers can import it."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of `items`, which are taken only a few ahead of the results."""
        ...


class Here:
    """This machine: as many items at a time as torch has threads.

    Making the next items (which may need all threads itself) and computing them take turns.
    """

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        threads = torch.get_num_threads()
        waiting = iter(items)
        with ThreadPoolExecutor(threads) as pool:
            while some := list(islice(waiting, AHEAD)):
                torch.set_num_threads(1)
                try:
                    results = list(pool.map(function, some))
                finally:
                    torch.set_num_threads(threads)
                yield from results


class Cluster:
    """A dask.distributed cluster, by a client that is connected to it.

    A worker that dies loses nothing: the scheduler gives its items to another.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        ahead = AHEAD_A_THREAD * max(1, sum(self._client.nthreads().values()))
        waiting, sent = iter(items), deque[Any]()
        while True:
            for item in islice(waiting, ahead - len(sent)):
                sent.append(self._client.submit(_alone, function, item, pure=False))
            if not sent:
                return
            yield self._result(sent.popleft())

    def _result(self, future: Any) -> Any:
        from distributed.scheduler import KilledWorker

        while True:
            try:
                return future.result(timeout=ALONE_SECONDS)
            except (TimeoutError, KilledWorker) as error:
                if isinstance(error, TimeoutError) and self._client.nthreads():
                    continue  # it is being worked on
                raise UnsupportedError(
                    "the workers of the cluster died, or left",
                    where=self._client.scheduler.address,
                    got=first_line(error),
                    todo="look at the workers' logs (memory?), or leave --workers out",
                ) from error


HERE = Here()


@contextmanager
def open_workers(address: str | None) -> Iterator[Workers]:
    """Workers at `dask://HOST:PORT`, or this machine for None.

    Raises `InputError` for another kind of address, a scheduler that can't be reached within some
    ten seconds, one without workers, or workers of another version; `UnsupportedError` where
    dask.distributed is missing.
    """
    if address is None:
        yield HERE
        return
    if not address.startswith(SCHEME) or not address.removeprefix(SCHEME):
        raise InputError("workers can't be read", expected=f"{SCHEME}HOST:PORT", got=repr(address))
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
    """Raise `InputError` where there is none, or where one would compute something else."""
    try:
        found = client.run(_versions)
    except Exception as error:  # whatever importing lfmc raised there
        raise InputError("a worker can't run lfmc", where=address, got=first_line(error)) from error
    if not found:
        raise InputError(
            "the cluster has no workers", where=address, todo="start one: `dask worker HOST:PORT`"
        )
    for worker, versions in found.items():
        if versions != _versions():
            raise InputError(
                "a worker has other versions, and could give other results",
                where=worker,
                expected=_versions(),
                got=versions,
            )


def _versions() -> str:
    return f"lfmc {__version__}, torch {torch.__version__}"


def _alone(function: Callable[[Item], Result], item: Item) -> Result:
    """On a worker: one item, on one thread."""
    torch.set_num_threads(1)
    return function(item)
