"""Constants from measurements: found again where they are known, and their errors carried along."""

import numpy as np
import pytest

from fedprompt_mpi.forecast.costs import Placement, Vector, evenly
from fedprompt_mpi.forecast.estimate import Estimate
from fedprompt_mpi.forecast.links import cost_of, fit_links, on_the_wire
from fedprompt_mpi.forecast.network import Contention, Network
from fedprompt_mpi.forecast.sources import Transfer

SLOW = Network(name="slow", latency_us=20, up_mbit=100, down_mbit=100, efficiency=0.95, source="made up")
FAST = Network(name="fast", latency_us=5, up_mbit=1000, down_mbit=1000, efficiency=0.95, source="made up")
SOFTWARE_S, STRETCH = 30e-6, 1.04
MEGABYTE = Vector(250_000, 1_000_000)
SIZES = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)


def measured(noise: float = 0.0, seed: int = 0) -> list[Transfer]:
    """Return what a network with these constants shows."""
    rng, found = np.random.default_rng(seed), []
    for count in (2, 3):
        place = evenly(count, 1, count - 1)
        for collective in ("broadcast", "gather", "reduce"):
            for size in SIZES:
                vector = Vector(size // 4, size)
                cost = cost_of(collective, place, vector)
                seconds = cost.messages * (SLOW.latency_s + SOFTWARE_S) + STRETCH * on_the_wire(cost, SLOW)
                seconds *= float(np.exp(noise * rng.standard_normal()))
                one = {"source": "made up", "collective": collective, "library": "MPICH", "seconds": seconds}
                found.append(Transfer(**one, place=place, vector=vector))
    return found


def test_constants_are_found_again() -> None:
    links = fit_links(measured(), SLOW, SLOW)
    assert links.alpha.value == pytest.approx(SLOW.latency_s + SOFTWARE_S, rel=0.02)
    assert links.stretch.value == pytest.approx(STRETCH, rel=0.01)


def test_another_network_keeps_what_software_takes() -> None:
    links = fit_links(measured(), SLOW, FAST)
    assert links.alpha.value == pytest.approx(FAST.latency_s + SOFTWARE_S, rel=0.02)
    found = links.seconds("gather", evenly(3, 1, 2), MEGABYTE)
    assert found.seconds == pytest.approx(2e6 * FAST.busiest_s_per_byte * STRETCH, rel=0.02)
    assert "rate" in found.spread


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_intervals_hold_what_is_measured_next(noise: float) -> None:
    rng, held = np.random.default_rng(100), []
    true = 4e6 * SLOW.busiest_s_per_byte * STRETCH
    for seed in range(20):
        low, high = fit_links(measured(noise, seed), SLOW, SLOW).seconds("gather", evenly(5, 1, 4), MEGABYTE).interval
        held += [low <= true * np.exp(noise * rng.standard_normal()) <= high for _ in range(50)]
    assert np.mean(held) > 0.85  # 0.95 of measurements whose median were known exactly


def test_without_the_network_s_name_its_rate_is_found() -> None:
    links = fit_links(measured(), None, None)
    assert links.seconds("gather", evenly(3, 1, 2), MEGABYTE).seconds == pytest.approx(
        2e6 * SLOW.busiest_s_per_byte * STRETCH, rel=0.03
    )
    elsewhere = fit_links(measured(), None, FAST)
    assert not elsewhere.stretch.measured  # nobody has said what the sources' rate was


def test_what_was_not_measured_is_less_certain() -> None:
    links = fit_links(measured(), SLOW, SLOW)

    def relative(nodes: int) -> float:
        found = links.seconds("reduce", evenly(nodes, 1, nodes - 1), MEGABYTE)
        return found.deviation / found.seconds

    assert relative(3) < relative(8) < relative(64)


def test_nodes_that_share_a_rate_are_slower_together() -> None:
    one = Network(
        name="one", latency_us=0, up_mbit=100, down_mbit=100, source="", contention=Contention(total_mbit=100)
    )
    cost = cost_of("reduce", evenly(8, 1, 7), MEGABYTE)
    assert on_the_wire(cost, one) == pytest.approx(7e6 * one.busiest_s_per_byte)
    free = Network(name="free", latency_us=0, up_mbit=100, down_mbit=100, source="")
    assert on_the_wire(cost, free) == pytest.approx(3e6 * free.busiest_s_per_byte)


def test_errors_of_one_constant_add_up_and_others_do_not() -> None:
    rate, other = Estimate(1.0, {"rate": 0.1}), Estimate(1.0, {"train": 0.1})
    assert (rate + rate).deviation == pytest.approx(0.2)
    assert (rate + other).deviation == pytest.approx(0.1 * 2**0.5)
    low, high = (rate + other).interval
    assert 0 < low < 2 < high and low * high == pytest.approx(4)


@pytest.mark.parametrize("collective", ["broadcast", "gather", "reduce", "headers of gather", "headers of reduce"])
def test_ranks_of_a_node_take_no_link(collective: str) -> None:
    cost = cost_of(collective, Placement((4,), 30), MEGABYTE)
    assert cost.wire == cost.total == cost.messages == 0 < cost.local_messages
