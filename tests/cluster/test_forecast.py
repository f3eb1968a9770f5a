"""A small part of `tests.cluster.forecast`: fit on two and three nodes of this cluster, forecast another rate.

The whole table, with five and eight nodes and real rounds, is in the guide of `forecast`.
"""

import json
from pathlib import Path

import pytest

from fedprompt_mpi.forecast.costs import Vector, evenly
from fedprompt_mpi.forecast.links import Links, fit_links
from fedprompt_mpi.forecast.network import read_network
from fedprompt_mpi.forecast.sources import read_sources
from tests.cluster.forecast import SOURCE_RATE, bench, network_file
from tests.cluster.virtual import Cluster
from tests.jobs import find_mpirun, is_open_mpi

TARGET_RATE = 100
VECTOR = Vector(1_536_000, 6_144_000)


@pytest.fixture(scope="module")
def links(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Links:
    """Return the constants of the cluster at another rate than the one at which they were measured."""
    if is_open_mpi(find_mpirun() or ""):
        pytest.skip("Open MPI's waiting ranks spin on the two cores that these nodes share: no forecast knows that")
    folder = tmp_path_factory.mktemp("forecast")
    cluster.limit(SOURCE_RATE)
    for name, ranks in (("bench-2", (1, 1)), ("bench-3", (1, 1, 1))):
        bench(cluster, ranks, folder / name)
    measured = read_sources([str(folder / "bench-2"), str(folder / "bench-3")])
    there, elsewhere = (read_network(str(network_file(folder, rate))) for rate in (SOURCE_RATE, TARGET_RATE))
    return fit_links(measured.transfers, there, elsewhere)


def test_six_megabytes_at_a_tenth_of_the_rate(cluster: Cluster, links: Links) -> None:
    cluster.limit(TARGET_RATE)
    done = cluster.mpirun((1, 1, 1), "-m", "tests.cluster.probe", "ours", str(VECTOR.numbers), "3")
    assert done.status == 0, done
    for collective, seconds in json.loads(done.out.splitlines()[-1]).items():
        measured, forecast = sorted(seconds)[1], links.seconds(collective, evenly(3, 1, 2), VECTOR)
        assert forecast.seconds == pytest.approx(measured, rel=0.1), collective
        low, high = forecast.interval
        assert low < measured < high, collective


def test_a_rate_that_is_wrong_gives_a_wrong_forecast(links: Links, tmp_path: Path) -> None:
    """The forecast follows the network's file: a figure in it that is off by a half is off by a half in the answer."""
    wrong = read_network(str(network_file(tmp_path, 2 * TARGET_RATE)))
    assert fit_links([], None, wrong).seconds("gather", evenly(3, 1, 2), VECTOR).seconds == pytest.approx(
        links.seconds("gather", evenly(3, 1, 2), VECTOR).seconds / 2, rel=0.1
    )
