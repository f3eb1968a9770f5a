"""Checkpoints: the last two are kept, whatever is damaged is noticed, and other settings are refused."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedprompt_mpi.config import ClientConfig, FederationConfig, OutputConfig, RunConfig, SettingsError, to_dict
from fedprompt_mpi.files import CannotWriteError
from fedprompt_mpi.rundir.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedprompt_mpi.rundir.paths import RunPaths
from fedprompt_mpi.rundir.records import RoundRecord

CONFIG = RunConfig()


def _checkpoint(round_: int) -> Checkpoint:
    state = {"momentum": np.full(5, 0.5, dtype=np.float32)}
    return Checkpoint(
        vector=np.arange(5, dtype=np.float32) + round_, round_=round_, record=RoundRecord(round=round_), state=state
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a run directory after four rounds."""
    for round_ in range(1, 5):
        save_checkpoint(RunPaths(tmp_path), _checkpoint(round_), CONFIG)
    return tmp_path


def _round_of(directory: Path, config: RunConfig = CONFIG) -> tuple[int, list[str]]:
    loaded, warnings = load_checkpoint(RunPaths(directory), to_dict(config))
    assert loaded is not None
    np.testing.assert_array_equal(loaded.vector, np.arange(5) + loaded.round_)
    np.testing.assert_array_equal(loaded.state["momentum"], 0.5)
    assert loaded.record == RoundRecord(round=loaded.round_)
    return loaded.round_, warnings


def test_the_last_two_are_kept(directory: Path) -> None:
    assert [file.path.name for file in RunPaths(directory).checkpoints()] == [
        "round-00000004.safetensors", "round-00000003.safetensors"
    ]  # fmt: skip
    assert _round_of(directory) == (4, [])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_noticed(directory: Path, data: st.DataObject) -> None:
    """A bit flipped, an end cut off, or bytes put in, anywhere: the checkpoint before is used, with a warning."""
    latest = RunPaths(directory).checkpoints()[0]
    content = latest.path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "zeros"])):
        case "flip":
            damaged = bytearray(content)
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            damaged = content[:at]
        case "insert":
            damaged = content[:at] + data.draw(st.binary(min_size=1, max_size=9)) + content[at:]
        case _:
            damaged = content[:at] + bytes(len(content) - at)
    latest.path.write_bytes(damaged)
    try:
        if damaged != content:
            round_, warnings = _round_of(directory)
            assert round_ == 3
            assert len(warnings) == 1
            assert "damaged" in warnings[0]
    finally:
        latest.path.write_bytes(content)


def test_a_foreign_file_is_no_checkpoint(directory: Path) -> None:
    save_file({"vector": np.zeros(5, dtype=np.float32)}, RunPaths(directory).checkpoints()[0].path)
    assert _round_of(directory)[0] == 3


def test_if_none_can_be_read_it_says_so(directory: Path) -> None:
    for file in RunPaths(directory).checkpoints():
        file.path.write_bytes(b"torn")
    with pytest.raises(SettingsError, match=r"round-00000004.* is damaged .*round-00000003.* is damaged .*start anew"):
        load_checkpoint(RunPaths(directory), to_dict(CONFIG))


def test_what_changes_the_mathematics_is_refused_with_the_difference(directory: Path) -> None:
    other = RunConfig(seed=3, client=ClientConfig(lr=0.2))
    with pytest.raises(SettingsError, match=r"client.lr = 0.3 \(now 0.2\), seed = 0 \(now 3\)"):
        load_checkpoint(RunPaths(directory), to_dict(other))
    longer = RunConfig(federation=FederationConfig(rounds=99), output=OutputConfig(checkpoint_every=7))
    assert _round_of(directory, longer)[0] == 4
    linear = dataclasses.replace(longer, client=ClientConfig(schedule="linear"))
    with pytest.raises(SettingsError, match="schedule"):
        load_checkpoint(RunPaths(directory), to_dict(linear))


def test_nothing_there_is_a_beginning(tmp_path: Path) -> None:
    assert load_checkpoint(RunPaths(tmp_path / "nowhere"), to_dict(CONFIG)) == (None, [])
    assert load_checkpoint(RunPaths(tmp_path), to_dict(CONFIG)) == (None, [])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="no run of this program"):
        load_checkpoint(RunPaths(tmp_path), to_dict(CONFIG))


def test_a_full_disk_leaves_the_last_good_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when all is to be on it (fsync): no file of round 5, none half written, and round 4 is there."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWriteError, match=r"round-00000005\.safetensors \(No space left on device\)"):
        save_checkpoint(RunPaths(directory), _checkpoint(5), CONFIG)
    assert len(list((directory / "checkpoint").iterdir())) == 2
    assert _round_of(directory) == (4, [])
