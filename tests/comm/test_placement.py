"""Workers take GPUs in turn, with a fake number of them; threads share a node's cores."""

import dataclasses

import numpy as np
import pytest

from fedprompt_mpi.comm import placement
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.comm.placement import (
    MOST_PROCESSORS,
    Placement,
    bind_device,
    describe_processors,
    share_of_cores,
    thread_count,
)

PLACE = dataclasses.replace(LocalChannel().placement, cores=8.0)


def _place(rank: int, local_rank: int, *, server_here: bool) -> Placement:
    nodes = np.zeros(rank + 1, dtype=np.int64)
    nodes[rank] = 0 if server_here else 1
    return dataclasses.replace(PLACE, rank=rank, local_rank=local_rank, nodes=nodes)


def test_first_node() -> None:
    """Rank 0 needs no GPU; the node's first worker takes the first one."""
    devices = [bind_device(4, _place(r, r, server_here=True), is_worker=r > 0) for r in range(5)]
    assert devices == ["cpu", "cuda:0", "cuda:1", "cuda:2", "cuda:3"]


def test_other_nodes() -> None:
    devices = [bind_device(4, _place(5 + r, r, server_here=False), is_worker=True) for r in range(4)]
    assert devices == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]


def test_more_workers_than_gpus_share_them_evenly() -> None:
    devices = [bind_device(2, _place(r, r, server_here=True), is_worker=r > 0) for r in range(1, 5)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_one_visible_gpu_each() -> None:
    """Under Slurm's --gpus-per-task=1 every worker sees one device, which is number 0 to it."""
    assert {bind_device(1, _place(r, r, server_here=True), is_worker=True) for r in range(1, 5)} == {"cuda:0"}


def test_alone_and_without_gpus() -> None:
    assert bind_device(4, PLACE, is_worker=True) == "cuda:0"
    assert bind_device(0, _place(3, 3, server_here=True), is_worker=True) == "cpu"


@pytest.mark.parametrize(
    ("cores", "environment", "one_client", "threads"),
    [
        (8 / 5, None, False, 1),
        (8 / 2, None, False, 4),
        (2 / 11, None, False, 1),
        (sum([1 / 3] * 9), None, False, 3),
        (8, None, False, 8),
        (8, None, True, 1),
        (8, "3", True, 3),
        (8, "many", False, 8),
    ],
)
def test_threads(cores: float, environment: str | None, one_client: bool, threads: int) -> None:
    place = dataclasses.replace(PLACE, cores=cores)
    assert thread_count(place, environment, one_client_a_pass=one_client) == threads


def test_processors_bound_to_one_rank_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank bound to processors 4 to 7 alone has four; sharing each with another rank, two."""
    monkeypatch.setattr(placement, "own_processors", lambda: {4, 5, 6, 7})
    sharers = np.zeros(MOST_PROCESSORS, dtype=np.int64)
    sharers[:8] = 1
    assert share_of_cores(sharers) == 4.0
    sharers[4:] = 2
    assert share_of_cores(sharers) == 2.0


@pytest.mark.parametrize(("processors", "text"), [((0,), "0"), ((0, 1, 2, 8), "0-2,8"), ((1, 3), "1,3"), ((), "")])
def test_processors(processors: tuple[int, ...], text: str) -> None:
    assert describe_processors(processors) == text
