"""Failures on other nodes than the launcher's: one report, with the host, and nobody hangs."""

from pathlib import Path

import pytest

from tests.cluster.virtual import Cluster
from tests.failures.conftest import check_report
from tests.jobs import SMALL, Finished, find_mpirun, is_open_mpi

RANKS = (1, 1, 1)


def _doomed(cluster: Cluster, fates: str, directory: Path, *flags: str, tolerant: bool = False) -> Finished:
    cluster.limit(1000)
    return cluster.mpirun(
        RANKS, "-m", "tests.failures.doomed", fates, *SMALL, f"--output.dir={directory}", *flags,
        deadline_s=80, launcher_flags=("--with-ft", "ulfm") if tolerant else (),
    )  # fmt: skip


def _check_report(finished: Finished, start: str) -> None:
    """One rank has spoken, once, and the job has ended soon after."""
    check_report(finished)
    _, *reports = finished.err.split("fedprompt_mpi: ")
    assert len(reports) == 1, finished
    assert reports[0].startswith(start)
    assert "ArithmeticError: boom" in reports[0]


def test_exceptions_on_two_nodes_are_one_report(cluster: Cluster, tmp_path: Path) -> None:
    finished = _doomed(cluster, "1:train:2:raise,2:train:2:raise", tmp_path / "run")
    _check_report(finished, "rank 1 of 3 on node1 failed in phase train of round 2")


@pytest.mark.parametrize("rank", [0, 2])
def test_others_do_not_go_on_after_an_exception(cluster: Cluster, rank: int, tmp_path: Path) -> None:
    """They could, under ULFM, which leaves the ranks of other nodes running after an abort."""
    if not is_open_mpi(find_mpirun() or ""):
        pytest.skip("this MPI's launcher ends the job with the first rank")
    finished = _doomed(cluster, f"{rank}:train:2:raise", tmp_path / "run", tolerant=True)
    _check_report(finished, f"rank {rank} of 3 on node{rank} failed in phase train of round 2")
    assert "lost rank" not in finished.out


def test_a_rank_killed_on_another_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    """Each node says what its ranks were doing; nobody takes those that the launcher ended for lost."""
    finished = _doomed(cluster, "2:train:2:kill", tmp_path / "run")
    assert finished.status not in (0, 2, 3, 75)
    assert finished.err.count("ended without a word") == 1, finished
    assert "rank 2 on node2 ended without a word" in finished.err
    assert "rank 2 in train of round 2" in finished.err
    for rank in (0, 1):
        assert f"last seen on node{rank}: rank {rank} in " in finished.err


def test_a_rank_killed_on_another_node_is_survived(cluster: Cluster, tmp_path: Path) -> None:
    if not is_open_mpi(find_mpirun() or ""):
        pytest.skip("this MPI's launcher ends the job with the first rank")
    finished = _doomed(cluster, "2:train:2:kill", tmp_path / "run", tolerant=True)
    assert finished.status == 0, finished
    assert "rank 2 on node2 ended without a word" in finished.err
    assert finished.err.count("fedprompt_mpi: ") == 1, finished
    assert "lost rank 2 in round 2" in finished.out


def test_a_rank_stopped_on_another_node_is_missed(cluster: Cluster, tmp_path: Path) -> None:
    finished = _doomed(cluster, "2:train:2:stop", tmp_path / "run", "--comm.deadline_s=15")
    assert finished.status == 3, finished
    assert finished.err.count("no sign of life from rank 2 for more than 15 s") == 1
    assert finished.err.count("fedprompt_mpi: ") == 1, finished
