"""Messages and bytes of collectives: against their own arithmetic, and against SimGrid where it is installed."""

import math
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fedprompt_mpi.comm.chunks import chunks_of
from fedprompt_mpi.comm.codec import FLOAT32
from fedprompt_mpi.comm.traffic import Journey
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.updates import HEADER
from fedprompt_mpi.forecast.costs import (
    HEADER_BYTES,
    Placement,
    Vector,
    broadcast,
    chunks,
    evenly,
    gather,
    headers,
    receive_buffers,
    reduce,
)
from tests.bench import simgrid

MEGABYTE = Vector(250_000, 1_000_000)
PLACES = [Placement(ranks, clients) for ranks in ((1, 2, 2), (2, 2, 2), (3,), (1,) * 8, (4, 4)) for clients in (10, 37)]


@pytest.mark.parametrize("place", PLACES)
def test_bytes_between_nodes_are_those_that_a_run_counts(place: Placement) -> None:
    nodes = [node for node, ranks in enumerate(place.ranks_on) for _ in range(ranks)]
    homes = home_ranks(place.clients, place.ranks)
    counts, vector = np.bincount(homes, minlength=place.ranks), Vector(1000, 4000)
    journey = Journey(nodes=np.array(nodes), counts=counts, size=1000, told_weights=place.clients + 1)
    assert gather(place, vector).total == journey.up(FLOAT32, "gather").wire_bytes
    assert reduce(place, vector).total == journey.up(FLOAT32, "reduce").wire_bytes
    assert broadcast(place, vector).total == journey.down(FLOAT32).wire_bytes
    assert HEADER.itemsize == HEADER_BYTES
    assert headers(place, "reduce").total == journey.headers(HEADER.itemsize).wire_bytes


@pytest.mark.parametrize(("nodes", "vectors"), [(2, 1), (3, 2), (5, 3), (7, 3), (8, 2 * 7 / 8), (64, 2 * 63 / 64)])
def test_a_broadcast_is_a_tree_and_from_eight_nodes_on_a_ring(nodes: int, vectors: float) -> None:
    place = evenly(nodes, 1, nodes - 1)
    assert broadcast(place, MEGABYTE).server_up == pytest.approx(vectors * 1e6)
    assert broadcast(place, MEGABYTE, "Open MPI").server_up == 1e6 * math.ceil(math.log2(nodes))


def test_a_gather_sends_every_far_vector_and_a_reduction_one_a_step() -> None:
    place = evenly(64, 8, 10_000)
    near = 7 * 20  # the first of 511 workers hold 20 clients each: 10,000 = 511 x 19 + 291
    assert gather(place, Vector(250, 1000)).server_down == 1000 * (10_000 - near)
    assert gather(place, Vector(250, 1000)).received == 511 - 7 - 1
    assert reduce(place, Vector(250, 1000)).server_down == 6 * 1000


@pytest.mark.parametrize("clients", [10, 10_000, 1_000_000])
@pytest.mark.parametrize("numbers", [250, 1_000_000])
def test_rank_0_holds_one_chunk_or_two(clients: int, numbers: int) -> None:
    widths = [chunk.stop - chunk.start for chunk in chunks_of(clients, numbers)]
    held = min(2, len(widths)) * 4 * clients * max(widths)
    assert receive_buffers(evenly(64, 8, clients), Vector(numbers, 4 * numbers), "gather") == held
    assert chunks(clients, numbers) == len(widths)


def test_a_short_format_is_cut_as_its_numbers_are() -> None:
    place, numbers = evenly(64, 8, 10_000), 22_744_506
    assert gather(place, Vector(numbers, 2 * numbers)).messages == gather(place, Vector(numbers, 4 * numbers)).messages


@pytest.mark.skipif(shutil.which("smpirun") is None, reason="needs SimGrid (Debian: libsimgrid-dev)")
@pytest.mark.parametrize("nodes", [2, 5, 8])
def test_simgrid_agrees(nodes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(simgrid.__file__).with_name("collectives.c")
        subprocess.run(["smpicc", "-O2", "-o", str(folder / "collectives"), str(source)], check=True)
        for size in (30_720, 6_144_000):
            simulated = simgrid.simulate(folder, nodes, size)
            assert set(simulated) == {"broadcast", "gather", "reduce"}
            for collective, seconds in simulated.items():
                assert simgrid.forecast(collective, nodes, size) == pytest.approx(seconds, rel=0.05)
