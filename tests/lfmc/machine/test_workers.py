"""Workers: this machine and a dask cluster compute the same results."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lfmc.calib_free.allocate.resources import Resources
from lfmc.calib_free.auto import method as auto
from lfmc.calib_free.grid.formats import GENERIC
from lfmc.calib_free.make_plan import Budget, make_plan
from lfmc.checkpoint.checkpoint import Checkpoint
from lfmc.errors import InputError, UnsupportedError
from lfmc.machine.workers import ITEMS_AHEAD, LOCAL_WORKERS, SCHEME, Cluster, open_workers


def double(item: int) -> int:
    return 2 * item


def die_once(item: tuple[int, str]) -> int:
    """Kill the worker process at item 5, the first time."""
    number, flag = item
    if number == 5 and not os.path.exists(flag):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def threads_of(item: int) -> int:
    return torch.get_num_threads()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a scheduler with two worker processes on loopback."""
    distributed: Any = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
    ) as cluster:
        yield cluster.scheduler_address.replace("tcp://", SCHEME)


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "TEXTS", 2)
    monkeypatch.setattr(auto, "LENGTH", 16)


def plan_of(checkpoint: Checkpoint, method: str = "auto", **resources: Any) -> str:
    plan = make_plan(checkpoint, GENERIC, method, Budget(4.5), resources=Resources(**resources))
    return plan.to_json()


def test_results_are_in_order_and_items_are_created_lazily() -> None:
    created: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10 * ITEMS_AHEAD):
            created.append(item)
            yield item

    results = LOCAL_WORKERS.map(double, items())
    assert next(results) == 0
    assert len(created) <= ITEMS_AHEAD
    assert list(results) == [2 * item for item in range(1, 10 * ITEMS_AHEAD)]
    assert list(LOCAL_WORKERS.map(double, [])) == []


def test_an_item_runs_on_one_thread_and_the_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(LOCAL_WORKERS.map(threads_of, range(4))) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_cluster_computes_the_same_plan(address: str, any_checkpoint: Any) -> None:
    checkpoint = any_checkpoint("lfm2_moe")
    with open_workers(address) as workers:
        assert isinstance(workers, Cluster)
        assert list(workers.map(double, range(100))) == [2 * item for item in range(100)]
        for method in ("auto", "alphaq"):
            assert plan_of(checkpoint, method, workers=workers) == plan_of(checkpoint, method)


def test_a_worker_that_dies_changes_nothing(
    address: str, any_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flag = str(tmp_path / "died")
    checkpoint = any_checkpoint("lfm2_moe")
    expected = plan_of(checkpoint)
    with open_workers(address) as workers:
        items = ((number, flag) for number in range(40))
        assert list(workers.map(die_once, items)) == list(range(40))
        assert os.path.exists(flag)
        assert isinstance(workers, Cluster)
        submit, killed = workers._client.submit, []

        def kill_a_worker_and_submit(*args: Any, **options: Any) -> Any:
            if not killed:
                pids = workers._client.run(os.getpid)
                killed.append(next(iter(pids.values())))
                os.kill(killed[0], signal.SIGKILL)
            return submit(*args, **options)

        monkeypatch.setattr(workers._client, "submit", kill_a_worker_and_submit)
        assert plan_of(checkpoint, workers=workers) == expected
        assert killed


@pytest.mark.parametrize("wrong_address", ["", "dask://", "tcp://127.0.0.1:1", "here"])
def test_a_wrong_address_is_an_input_error(wrong_address: str) -> None:
    with pytest.raises(InputError, match="can't be read"), open_workers(wrong_address):
        pass


def test_an_unreachable_scheduler_is_an_input_error() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(InputError, match="can't be reached"), open_workers("dask://127.0.0.1:9"):
        pass


def test_the_error_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UnsupportedError, match="not installed") as caught,
        open_workers("dask://127.0.0.1:8786"),
    ):
        pass
    assert "lfmc[dask]" in str(caught.value)
    assert caught.value.exit_code == 4


def test_no_address_is_this_machine() -> None:
    with open_workers(None) as workers:
        assert workers is LOCAL_WORKERS
