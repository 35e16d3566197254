"""Memory of states, and the check that a model fits in memory before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lfmc
from lfmc.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmc.checkpoint.footprint import footprint, footprints, require_memory, state_nbytes
from lfmc.errors import UnsupportedError


def test_attention_grows_and_convolutions_do_not() -> None:
    config = open_checkpoint().config
    short, long = state_nbytes(config, 128), state_nbytes(config, 256)
    assert long.attention == 2 * short.attention == 2 * 4 * (2 * 2 * 2 * 128 * 64)
    assert long.conv == short.conv == 4 * (4 * 256 * 2)


def test_a_sliding_window_counts_only_its_positions(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    config = any_checkpoint("lfm3").config  # one layer with a window of 8, one full; 2 heads of 32
    slot = 2 * 4 * 2 * 32
    assert state_nbytes(config, 4).attention == slot * (4 + 4)
    assert state_nbytes(config, 100).attention == slot * (8 + 100)


def test_a_footprint_is_weights_and_states() -> None:
    demo = open_checkpoint()
    memory = footprint(demo, 512)
    states = state_nbytes(demo.config, 512)
    on_disk = sum(file.stat().st_size for file in demo.path.glob("*.safetensors"))
    assert memory.weights == pytest.approx(on_disk, rel=0.01)
    assert (memory.attention, memory.conv) == (states.attention, states.conv)
    assert memory.total == memory.weights + states.attention + states.conv
    assert memory.all_attention == 3 * states.attention  # 2 of 6 layers have attention
    assert memory.all_attention_total == memory.weights + memory.all_attention


def test_footprints_stay_within_the_longest_context(
    any_checkpoint: Callable[[str], Checkpoint],
) -> None:
    assert [f.context for f in footprints(open_checkpoint())] == [512, 2048, 8192, 32768]
    assert [f.context for f in footprints(any_checkpoint("lfm2"))] == [512]


def test_a_model_larger_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = open_checkpoint()
    require_memory(demo, 12 * demo.num_params, "this", "nothing")
    monkeypatch.setattr("os.sysconf", lambda name: 1024)  # a page of 1 KiB, 1024 of them
    with pytest.raises(UnsupportedError, match="does not fit") as caught:
        require_memory(demo, 12 * demo.num_params, "this", "buy memory")
    assert "0.1 GiB (12 bytes per parameter)" in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("megabytes", "task", "todo"),
    [(16, "lowering", "a machine with more memory"), (36, "parity", "--check off")],
)
def test_an_export_that_does_not_fit_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, megabytes: int, task: str, todo: str
) -> None:
    monkeypatch.setattr("lfmc.targets.memory.LIBRARIES", 0)
    monkeypatch.setattr(
        "lfmc.checkpoint.footprint.installed_nbytes", lambda device: megabytes * 10**6
    )
    monkeypatch.setattr(
        "lfmc.exporter.export.lower_within_budget", lambda *_: pytest.fail("a plan was computed")
    )
    with pytest.raises(UnsupportedError, match=f"{task} of this model does not fit") as caught:
        lfmc.export(bits="4", output=tmp_path / "b")
    assert todo in str(caught.value)
    assert list(tmp_path.iterdir()) == []
