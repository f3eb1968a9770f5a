"""Vectors arrive as they were sent, whoever has how many. Runs under mpirun (see test_under_mpirun.py)."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from fedprompt_mpi.comm import channel as channel_module
from fedprompt_mpi.comm.channel import HEADER, Channel, open_channel
from fedprompt_mpi.comm.launcher import read_launch

pytestmark = pytest.mark.mpi


@pytest.fixture(params=[False, True], ids=["observe", "measure"])
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    opened = open_channel(read_launch(), measure=request.param)
    yield opened
    opened.close()


def _counts(size: int, clients: int) -> np.ndarray:
    counts = np.zeros(size, dtype=np.int64)
    counts[1:] = [len(block) for block in np.array_split(np.arange(clients), size - 1)]
    return counts


@pytest.mark.parametrize("length", [1, 7, 4096])
def test_broadcast(channel: Channel, length: int) -> None:
    vector = np.arange(length, dtype=np.float32) if channel.rank == 0 else np.zeros(length, dtype=np.float32)
    channel.broadcast(vector, fingerprint=5)
    np.testing.assert_array_equal(vector, np.arange(length))


@pytest.mark.parametrize("clients", [1, 7, 10])
@pytest.mark.parametrize("chunk_bytes", [32 * 2**20, 64])
def test_gather_in_client_order(
    channel: Channel, clients: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "CHUNK_BYTES", chunk_bytes)
    length = 23
    counts = _counts(channel.size, clients)
    first = int(counts[: channel.rank].sum())
    own = np.arange(first, first + counts[channel.rank])
    headers = np.zeros(len(own), dtype=HEADER)
    headers["client"], headers["num_examples"] = own, 100 + own
    deltas = (own[:, None] * 1000 + np.arange(length)).astype(np.float32)
    gathered = channel.gather(headers, deltas, counts)
    np.testing.assert_array_equal(gathered.headers["client"], np.arange(clients))
    np.testing.assert_array_equal(gathered.headers["num_examples"], 100 + np.arange(clients))
    whole = np.zeros((clients, length), dtype=np.float32)
    pieces = 0
    for piece, block in gathered.blocks:
        pieces += 1
        if channel.rank == 0:
            assert block.nbytes <= max(chunk_bytes, 4 * clients)
            whole[:, piece] = block
    assert pieces == -(-length // max(1, min(length, chunk_bytes // (4 * clients))))
    if channel.rank == 0:
        np.testing.assert_array_equal(whole, np.arange(clients)[:, None] * 1000 + np.arange(length))


def test_sum_and_agree(channel: Channel) -> None:
    total = channel.sum(np.array([1.0, channel.rank]))
    np.testing.assert_array_equal(total, [channel.size, channel.size * (channel.size - 1) / 2])
    assert channel.agree(None) is None
    assert channel.agree("völlig falsch" if channel.rank == channel.size - 1 else None) == "völlig falsch"
    assert channel.agree(f"from {channel.rank}") == "from 0"


def test_collecting(channel: Channel) -> None:
    channel.timing.round_ = 3
    channel.timing.add("train", channel.rank + 0.5, 10)
    texts, timings = channel.collect_text(f"rank {channel.rank}"), channel.collect_timings()
    if channel.rank:
        assert (texts, timings) == ([], [])
        return
    assert texts == [f"rank {r}" for r in range(channel.size)]
    for rank, records in enumerate(timings):
        assert records[-1].tolist() == (3, 3, rank + 0.5, 10)


def test_the_shared_folder_is_shared_and_goes(channel: Channel) -> None:
    folder = channel.shared_folder()
    (folder / f"{channel.rank}").write_text("here")
    channel.node_barrier()
    assert {path.name for path in folder.iterdir()} == {str(r) for r in range(channel.size)}
    channel.drop_shared_folder()
    channel.node_barrier()
    assert not folder.exists()


def test_progress_of_the_slowest(channel: Channel) -> None:
    """Rank 0 is told, while it waits, how far the slowest worker is."""
    seen: list[int] = []
    vector = np.zeros(1, dtype=np.float32)
    steps = np.full(channel.size, 10, dtype=np.int64)
    steps[0] = 0  # no client there: nothing to wait for
    channel.watch_progress(seen.append if channel.rank == 0 else None, steps)
    channel.broadcast(vector, 0)
    if channel.rank:
        for left in (9, 7):
            channel.report_progress(left - channel.rank)
            time.sleep(0.3)
    counts = _counts(channel.size, channel.size - 1)
    own = int(counts[channel.rank])
    gathered = channel.gather(np.zeros(own, dtype=HEADER), np.zeros((own, 1), dtype=np.float32), counts)
    list(gathered.blocks)
    channel.watch_progress(None, steps)
    if channel.rank == 0:
        assert seen[-1] == 4  # rank 1, with 6 left of 10
