"""What hurts is named, what does not is not; the hosts and GPUs are made up."""

import dataclasses

import pytest

from fedprompt_mpi.comm.placement import MPILibrary
from fedprompt_mpi.commands.doctor import RankView, format_ranks, warnings_of
from tests.jobs import launch

MPI = MPILibrary(
    library="MPICH 5", transport="ch4:ucx", thread_level="multiple", clock_resolution_s=1e-9, survives=False
)


def _rank(rank: int, **fields: object) -> RankView:
    known = {
        "host": "a", "node": 0, "kernel": "k0", "processors": (rank,), "threads": 1, "device": "cpu", "gpu": "",
        "mpi": MPI, "hub_cache": "/cache", "hub_cache_exists": True, "hub_offline": False,
    }  # fmt: skip
    return RankView(rank=rank, **{**known, **fields})  # type: ignore[arg-type]


TWO_NODES = [_rank(0), _rank(1), _rank(2, host="b", node=1, kernel="k1"), _rank(3, host="b", node=1, kernel="k1")]


def test_a_job_as_it_should_be() -> None:
    assert warnings_of(TWO_NODES) == []
    table = format_ranks(TWO_NODES)
    assert "server" in table.splitlines()[-4]
    assert table.splitlines()[-1].split() == ["3", "b", "1", "worker", "3", "1", "cpu"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({1: {"gpu": "G", "device": "cuda:0"}, 2: {}, 3: {}}, "ranks 2 and 3 see no GPU"),
        ({0: {"processors": (0,)}, 1: {"processors": (0,)}}, "a: 2 ranks on 1 core:"),
        ({0: {"threads": 4}, 1: {"threads": 4}}, "a: 2 ranks compute with 8 threads on 2 cores: set OMP_NUM_THREADS"),
        ({2: {"node": 0}, 3: {"node": 0}}, "MPI takes a and b for one node"),
        ({2: {"kernel": "k0"}, 3: {"kernel": "k0"}}, "a and b run on one kernel"),
        ({3: {"mpi": dataclasses.replace(MPI, library="MPICH 4")}}, "different MPI libraries: MPICH 4; MPICH 5"),
        ({3: {"mpi": dataclasses.replace(MPI, transport="ch4:ofi")}}, "different settings of the transport"),
        ({2: {"hub_cache_exists": False}}, "the hub cache is missing on b"),
    ],
)
def test_what_hurts(changes: dict[int, dict[str, object]], words: str) -> None:
    ranks = [dataclasses.replace(rank, **changes.get(rank.rank, {})) for rank in TWO_NODES]  # type: ignore[arg-type]
    (warning,) = warnings_of(ranks)
    assert words in warning


def test_two_ranks_on_one_gpu() -> None:
    ranks = [dataclasses.replace(rank, device="cuda:0", gpu="G") if rank.rank else rank for rank in TWO_NODES]
    (warning,) = warnings_of(ranks)  # rank 1 has a GPU of the same name, on another node
    assert "ranks 2 and 3 train on one GPU" in warning


def test_three_ranks_bound_to_one_core_beside_idle_ones() -> None:
    ranks = [_rank(rank, processors=(0,) if rank < 2 else (1, 2)) for rank in range(3)]
    (warning,) = warnings_of(ranks)
    assert "a: 2 ranks are bound to core 0" in warning


def test_a_folder_named_missing_is_not_missing() -> None:
    ranks = [dataclasses.replace(rank, hub_cache="/data/missing-models") for rank in TWO_NODES]
    assert warnings_of(ranks) == []
    assert "(missing)" not in format_ranks(ranks)


def test_round_trip() -> None:
    assert RankView.from_json(_rank(1, processors=(0, 2)).to_json()) == _rank(1, processors=(0, 2))


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_command(ranks: int) -> None:
    finished = launch(ranks, "-m", "fedprompt_mpi", "doctor")
    assert finished.status == 0, finished
    rows = [line.split() for line in finished.out.splitlines()]
    table = [row for row in rows if len(row) == 7 and row[0].isdigit()]
    assert [row[0] for row in table] == [str(rank) for rank in range(ranks)]
    assert [row[3] for row in table] == (["both"] if ranks == 1 else ["server", "worker", "worker"])
    assert finished.out.count("MPI library") == 1
