"""The whole job with ranks on three nodes: what soft prompts, P-tuning and full fine-tuning really take."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_network import GOODPUT
from tests.cluster.virtual import Cluster
from tests.jobs import SMALL, read_rounds

METHODS = ("soft", "p_tuning", "full")
RATE_MBIT = 100
RANKS = (1, 1, 1)


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return method -> its run directory."""
    cluster.limit(RATE_MBIT)
    root = tmp_path_factory.mktemp("methods")
    for method in METHODS:
        flags = [
            f"--prompt.method={method}",
            f"--output.dir={root / method}",
            "--comm.mode=measure",
            "--client.lr=0.001",
        ]
        flags += ["--output.evaluate_every=4", "--federation.rounds=4"]
        finished = cluster.mpirun(RANKS, "-m", "fedprompt_mpi", *SMALL, *flags, deadline_s=180)
        assert finished.status == 0, finished
    return {method: root / method for method in METHODS}


def _read(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text())


def test_the_node_map(runs: dict[str, Path]) -> None:
    ranks = _read(runs["soft"], "environment.json")["ranks"]
    assert [(rank["host"], rank["node"]) for rank in ranks] == [
        ("node0", 0), ("node1", 1), ("node2", 2)
    ]  # fmt: skip


def test_seconds_side_by_side(runs: dict[str, Path]) -> None:
    """A method's transfer is what rank 0's link allows for its bytes; of so small a PLM P-tuning sends most."""
    print(f"\n{'method':<10}{'bytes a client':>15}{'wire bytes a round':>20}{'transfer, s':>13}{'wait, s':>9}")
    transfers = {}
    for method, directory in runs.items():
        figures, summary = _read(directory, "communication.json"), _read(directory, "summary.json")
        traffic = read_rounds(directory)[-1]["traffic"]
        wire = traffic["down"]["wire_bytes"] + traffic["up"]["wire_bytes"]
        seconds = figures["seconds"]
        transfers[method] = seconds["transfer"]["median"]
        print(
            f"{method:<10}{summary['bytes_per_client_round']:>15,}{wire:>20,}"
            f"{transfers[method]:>13.4f}{seconds['wait']['median']:>9.3f}"
        )
        assert wire == (2 + 10) * summary["bytes_per_client_round"]
    for method in ("p_tuning", "full"):
        size = _read(runs[method], "summary.json")["bytes_per_client_round"]
        allowed = (2 + 10) * size * 8 / (RATE_MBIT * 1e6) / GOODPUT
        assert transfers[method] == pytest.approx(allowed, rel=0.1)
    assert transfers["soft"] < 0.01 * transfers["full"]
