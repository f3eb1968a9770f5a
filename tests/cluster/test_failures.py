"""Failures on other nodes than the launcher's: one report, with the host, and nobody hangs."""

from pathlib import Path

from tests.cluster.virtual import Cluster
from tests.jobs import SMALL, Finished, find_mpirun, is_open_mpi

RANKS = (1, 1, 1)


def _doomed(cluster: Cluster, fates: str, directory: Path, *flags: str) -> Finished:
    cluster.limit(1000)
    return cluster.mpirun(
        RANKS, "-m", "tests.failures.doomed", fates, *SMALL, f"--output.dir={directory}", *flags, deadline_s=80
    )


def test_exceptions_on_two_nodes_are_one_report(cluster: Cluster, tmp_path: Path) -> None:
    """Open MPI takes seconds to end other nodes' ranks, which may speak meanwhile: there the first report counts."""
    finished = _doomed(cluster, "1:train:2:raise,2:train:2:raise", tmp_path / "run")
    assert finished.status == 3, finished.err
    _, first, *others = finished.err.split("fedprompt_mpi: ")
    assert first.startswith("rank 1 of 3 on node1 failed in phase train of round 2")
    assert "ArithmeticError: boom" in first
    assert not others or is_open_mpi(find_mpirun() or "")


def test_a_rank_killed_on_another_node_is_named(cluster: Cluster, tmp_path: Path) -> None:
    finished = _doomed(cluster, "2:train:2:kill", tmp_path / "run")
    assert finished.status not in (0, 2, 3, 75)
    assert "rank 2 on node2 ended without a word" in finished.err
    assert "rank 2 in train of round 2" in finished.err


def test_a_rank_stopped_on_another_node_is_missed(cluster: Cluster, tmp_path: Path) -> None:
    finished = _doomed(cluster, "2:train:2:stop", tmp_path / "run", "--comm.deadline_s=15")
    assert finished.status == 3, finished.err
    assert finished.err.count("no sign of life from rank 2 for more than 15 s") == 1
